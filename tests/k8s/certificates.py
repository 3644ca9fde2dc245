"""The certificates of a cluster, and what its clients know it by."""

import base64
import json

import tools


def make(directory, api, addresses, nodes):
    """Makes all of them in `pki` of a directory, and NAME.kubeconfig for each client: `kubelet` for the first node,
    `kubelet-NODE` for the others."""
    pki = directory / "pki"
    pki.mkdir(mode=0o700)

    def openssl(*words):
        tools.run(["openssl", *words], "make certificates", cwd=pki)
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2",
            "-subj", "/CN=runx-k8s")
    openssl("genrsa", "-out", "sa.key", "2048")
    openssl("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    names = {"admin": "/O=system:masters/CN=admin", "controllers": "/CN=system:kube-controller-manager",
             "scheduler": "/CN=system:kube-scheduler", "api": "/O=system:masters/CN=kube-apiserver"}
    for node in nodes:
        names["kubelet" if node == nodes[0] else f"kubelet-{node}"] = f"/O=system:nodes/CN=system:node:{node}"
    for name, subject in names.items():
        extensions = "extendedKeyUsage=clientAuth,serverAuth\n"
        if name == "api":
            extensions += f"subjectAltName={','.join(f'IP:{address}' for address in addresses)}\n"
        (pki / f"{name}.ext").write_text(extensions)
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt")
        if name != "api":
            (directory / f"{name}.kubeconfig").write_text(kubeconfig(pki, name, api))


def kubeconfig(pki, name, api):
    """With everything in it: not all who use it see this directory."""
    def data(file):
        return base64.b64encode((pki / file).read_bytes()).decode()
    return json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"https://{api}", "certificate-authority-data": data("ca.crt")}}],
        "users": [{"name": "u", "user": {
            "client-certificate-data": data(f"{name}.crt"), "client-key-data": data(f"{name}.key")}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]})
