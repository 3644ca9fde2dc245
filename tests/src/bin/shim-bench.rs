//! How long a shim takes for the life of one container, without containerd: the start command, Create, Start, the
//! end of a `true`, and Delete.
//!
//!     shim-bench ROUNDS GAP_MS

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options;
use runx_tests::bench::{Row, Stopwatch, arguments, modes};
use runx_tests::cri;
use runx_tests::shim::{Host, Make};

fn main() {
    let (rounds, gap) = arguments();
    let mut hosts = vec![("runx", Host::new(Make::Runx))];
    if Make::Runc.program().is_some() {
        hosts.push(("runc", Host::new(Make::Runc)));
        if let Some(crun) = cri::crun() {
            let options = Options { binary_name: crun.to_string_lossy().into_owned(), ..Options::default() };
            let mut host = Host::new(Make::Runc);
            host.options = Some(Any {
                type_url: "containerd.runc.v1.Options".into(),
                value: options.write_to_bytes().expect("a message"),
                ..Any::default()
            });
            hosts.push(("crun", host));
        }
    }
    for (mode, pause) in modes(gap) {
        for round in 0..rounds {
            for (runtime, host) in &hosts {
                let id = format!("b{round}{}", &mode[..1]);
                host.make_bundle(&id, &["/bin/true"], |_| ());
                std::thread::sleep(pause);
                let mut watch = Stopwatch::start();
                let shim = host.shim(&id);
                watch.lap("start command");
                shim.create(&host.create_request(&id)).expect("create");
                watch.lap("Create");
                shim.start(&id, "").expect("start");
                watch.lap("Start");
                shim.wait(&id, "").expect("wait");
                watch.lap("Wait");
                shim.delete(&id, "").expect("delete");
                watch.lap("Delete");
                // containerd's own closes the connection before it answers.
                let _ = shim.shutdown(&id);
                // The first fills caches.
                if round > 0 {
                    watch.report(&Row { suite: "shim", bundle: "bare", mode, runtime }, "all of it");
                }
            }
        }
    }
    for (_, host) in &hosts {
        host.assert_nothing_left();
    }
}
