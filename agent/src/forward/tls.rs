//! TLS, at either end.

use std::sync::Arc;

use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{self, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Whom a certificate has to be for.
pub(super) type Name = ServerName<'static>;

/// Where distributions keep the authorities that they trust.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The name of a host.
///
/// # Errors
/// When it can be none.
pub(super) fn name(host: &str) -> Result<Name, String> {
    ServerName::try_from(host.to_owned()).map_err(|e| format!("target: {host}: {e}"))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.map_err(|e| e.to_string()).and_then(|all| if all.is_empty() { Err("it holds none".into()) } else { Ok(all) })
}

/// For those who connect.
///
/// # Errors
/// What is wrong with the certificate or the key. The key is in no text.
pub(super) fn acceptor(certificate: &str, key: &str) -> Result<TlsAcceptor, String> {
    let chain = certificates(certificate.as_bytes()).map_err(|e| format!("tls.certificate: {e}"))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| "tls.key: it is no private key in PEM form")?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("tls: {e}"))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| format!("tls: {e}"))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// To a target, whose certificate has to be of an authority: the one given, or those that the system trusts.
///
/// # Errors
/// When there is none.
pub(super) fn connector(authority: Option<&str>, anybody: bool) -> Result<TlsConnector, String> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("target: {e}"))?;
    if anybody {
        let verifier =
            Arc::new(Anybody(CryptoProvider::clone(&ring::default_provider()).signature_verification_algorithms));
        let config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
        return Ok(TlsConnector::from(Arc::new(config)));
    }
    let mut roots = RootCertStore::empty();
    match authority {
        Some(pem) => {
            for certificate in certificates(pem.as_bytes()).map_err(|e| format!("target_ca: {e}"))? {
                roots.add(certificate).map_err(|e| format!("target_ca: {e}"))?;
            }
        }
        None => {
            let Some(pem) = AUTHORITIES.iter().find_map(|path| std::fs::read(path).ok()) else {
                return Err("target: this system has no certificate authorities; give target_ca".into());
            };
            // One that cannot be read is one less.
            roots.add_parsable_certificates(certificates(&pem).map_err(|e| format!("target: {e}"))?);
        }
    }
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Takes any certificate: who asked for it has said that he wants that.
#[derive(Debug)]
struct Anybody(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
