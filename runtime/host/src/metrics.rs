//! What a server tells Prometheus, in its text format 0.0.4.

use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::{Request, Response};
use tokio::net::TcpListener;
use wasmtime_wasi_http::io::TokioIo;

/// Upper bounds of the histogram's buckets, in microseconds.
const BUCKETS: [u64; 12] = [100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 500_000, 2_500_000];

/// Counters. All only grow but for the instances that there are.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// By the first digit of the status.
    requests: [AtomicU64; 6],
    /// Requests that took no longer than each bound, and longer than the one before.
    buckets: [AtomicU64; BUCKETS.len() + 1],
    microseconds: AtomicU64,
    instances: AtomicU64,
    made: AtomicU64,
    failed: AtomicU64,
}

fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Metrics {
    /// A request was answered, until its body begins.
    pub(crate) fn request(&self, status: u16, time: Duration) {
        let time = time.as_micros() as u64;
        add(&self.requests[usize::from(status / 100).min(5)], 1);
        add(&self.buckets[BUCKETS.iter().position(|bound| time <= *bound).unwrap_or(BUCKETS.len())], 1);
        add(&self.microseconds, time);
    }

    /// There is one instance more.
    pub(crate) fn instance_made(&self) {
        add(&self.instances, 1);
        add(&self.made, 1);
    }

    /// There is one less, which may have failed.
    pub(crate) fn instance_gone(&self, failed: bool) {
        self.instances.fetch_sub(1, Ordering::Relaxed);
        add(&self.failed, failed.into());
    }

    fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let mut line = |text: std::fmt::Arguments<'_>| {
            let _ = writeln!(out, "{text}");
        };
        line(format_args!("# HELP runx_wasm_requests_total Requests that were answered."));
        line(format_args!("# TYPE runx_wasm_requests_total counter"));
        for (class, counter) in self.requests.iter().enumerate().skip(1) {
            line(format_args!("runx_wasm_requests_total{{code=\"{class}xx\"}} {}", get(counter)));
        }
        line(format_args!("# HELP runx_wasm_request_duration_seconds Time from a request's head to its answer's."));
        line(format_args!("# TYPE runx_wasm_request_duration_seconds histogram"));
        let mut count = 0;
        for (bound, counter) in BUCKETS.iter().zip(&self.buckets) {
            count += get(counter);
            let bound = *bound as f64 / 1e6;
            line(format_args!("runx_wasm_request_duration_seconds_bucket{{le=\"{bound}\"}} {count}"));
        }
        count += get(&self.buckets[BUCKETS.len()]);
        line(format_args!("runx_wasm_request_duration_seconds_bucket{{le=\"+Inf\"}} {count}"));
        line(format_args!("runx_wasm_request_duration_seconds_sum {}", get(&self.microseconds) as f64 / 1e6));
        line(format_args!("runx_wasm_request_duration_seconds_count {count}"));
        for (name, kind, help, counter) in [
            ("runx_wasm_instances", "gauge", "Instances that there are.", &self.instances),
            ("runx_wasm_instances_total", "counter", "Instances that were made.", &self.made),
            ("runx_wasm_instance_failures_total", "counter", "Instances that trapped or were ended.", &self.failed),
        ] {
            line(format_args!("# HELP {name} {help}"));
            line(format_args!("# TYPE {name} {kind}"));
            line(format_args!("{name} {}", get(counter)));
        }
        out
    }
}

/// Answers every request with the text.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let metrics = metrics.clone();
        let service = hyper::service::service_fn(move |_: Request<hyper::body::Incoming>| {
            let mut response = Response::new(Full::new(Bytes::from(metrics.text())));
            let kind = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4");
            response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind);
            async move { Ok::<_, Infallible>(response) }
        });
        tokio::spawn(async move {
            // Who breaks off has read enough.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let metrics = Metrics::default();
        metrics.request(200, Duration::from_micros(90));
        metrics.request(404, Duration::from_micros(300));
        metrics.request(500, Duration::from_secs(9));
        metrics.instance_made();
        metrics.instance_made();
        metrics.instance_gone(true);
        let text = metrics.text();
        for line in [
            "runx_wasm_requests_total{code=\"4xx\"} 1",
            "runx_wasm_request_duration_seconds_bucket{le=\"0.0001\"} 1",
            "runx_wasm_request_duration_seconds_bucket{le=\"0.0005\"} 2",
            "runx_wasm_request_duration_seconds_bucket{le=\"2.5\"} 2",
            "runx_wasm_request_duration_seconds_bucket{le=\"+Inf\"} 3",
            "runx_wasm_request_duration_seconds_sum 9.00039",
            "runx_wasm_instances 1",
            "runx_wasm_instances_total 2",
            "runx_wasm_instance_failures_total 1",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
    }
}
