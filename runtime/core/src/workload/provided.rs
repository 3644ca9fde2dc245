//! A module that is not a file of the container's root filesystem: OCI WASM artifacts have it in a layer of its own, which
//! nobody can unpack.

use std::fmt;
use std::fs::File;
use std::io;

/// Where to ask for a module when the root filesystem holds no program of the name.
pub trait ModuleSource: fmt::Debug + Send {
    /// The module, or `None` when there is none and the program is simply missing.
    ///
    /// # Errors
    /// When it could not be found out.
    fn find(&self) -> io::Result<Option<Box<dyn Provided>>>;
}

/// A module of a [`ModuleSource`].
pub trait Provided {
    /// Its SHA-256, in hexadecimal digits.
    fn digest(&self) -> &str;

    /// Its first bytes, from which its kind is told. It is asked for before anything that is cached under its digest is used:
    /// whoever cannot read the module does not get what was made of it.
    ///
    /// # Errors
    /// Those of reading.
    fn beginning(&self) -> io::Result<Vec<u8>>;

    /// All of it, in a file. It is asked for only if it has to be compiled.
    ///
    /// # Errors
    /// Those of reading, and that it is not what its digest says.
    fn read(&self) -> io::Result<File>;
}
