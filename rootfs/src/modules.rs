//! Kernel modules out of the initramfs.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use oriel_init::protocol::MODULES_DIR;
use rustix::io::Errno;

/// Loads `files` in their order.
pub(crate) fn load(files: &[String]) -> Result<()> {
    for file in files {
        let path = Path::new(MODULES_DIR).join(file);
        let module = File::open(&path)
            .with_context(|| format!("cannot open kernel module {}", path.display()))?;
        match rustix::system::finit_module(&module, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            // A kernel that has no modules at all has built in what it has. That of kernel-config/build is one, and
            // is installed beside the modules of the distribution's.
            Err(Errno::NOSYS) => {}
            // One that is built in collides with itself in some other way.
            Err(_) if Path::new("/sys/module").join(name(file)).exists() => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot load kernel module {file}"));
            }
        }
    }
    Ok(())
}

/// The kernel's name of the module in `file`.
fn name(file: &str) -> String {
    file.trim_end_matches(".ko").replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn a_module_is_named_with_underscores() {
        assert_eq!(name("kvm-amd.ko"), "kvm_amd");
    }
}
