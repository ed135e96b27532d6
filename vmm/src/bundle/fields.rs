//! Which fields of `config.json` count, and what is said of the others. Every field is in this table, or is said to be
//! left out: none is passed over in silence.

use anyhow::{Result, bail};
use serde_json::Value;

/// What becomes of a field, and of all below it.
#[derive(Clone, Copy)]
enum Fate {
    /// What it says is done.
    Done,
    /// It means nothing to a runtime.
    Meaningless,
    /// It is left out, and this is said of it.
    LeftOut(&'static str),
    /// The bundle cannot be what it is meant to be without it, for this reason.
    Refused(&'static str),
}

const ANOTHER_PLATFORM: Fate = Fate::Refused("it is for another platform than Linux; leave it");
const THE_GUESTS_OWN: &str = "the guest is a machine of its own";
const NO_CGROUP: &str = "the guest's commands have no cgroup of their own";

const FIELDS: &[(&str, Fate)] = &[
    ("ociVersion", Fate::Done),
    // Whoever makes a bundle puts there what it wants, and a runtime is to ignore what it does not know.
    ("annotations", Fate::Meaningless),
    ("root.path", Fate::Done),
    ("root.readonly", Fate::Done),
    ("hostname", Fate::Done),
    ("domainname", Fate::Done),
    ("mounts", Fate::Done),
    (
        "hooks",
        Fate::Refused(
            "its programs are not run, and the bundle may not work without them; leave it",
        ),
    ),
    ("process.terminal", Fate::Done),
    ("process.consoleSize", Fate::LeftOut("a terminal has the size of the user's")),
    ("process.user.uid", Fate::Done),
    ("process.user.gid", Fate::Done),
    ("process.user.umask", Fate::Done),
    ("process.user.additionalGids", Fate::Done),
    ("process.args", Fate::Done),
    ("process.env", Fate::Done),
    ("process.cwd", Fate::Done),
    ("process.rlimits", Fate::Done),
    ("process.capabilities", Fate::Done),
    ("process.noNewPrivileges", Fate::Done),
    ("process.apparmorProfile", Fate::LeftOut("the guest has no AppArmor")),
    ("process.selinuxLabel", Fate::LeftOut("the guest has no SELinux")),
    ("process.oomScoreAdj", Fate::LeftOut(THE_GUESTS_OWN)),
    ("linux.namespaces", Fate::Done),
    ("linux.uidMappings", Fate::Done),
    ("linux.gidMappings", Fate::Done),
    ("linux.sysctl", Fate::Done),
    ("linux.maskedPaths", Fate::Done),
    ("linux.readonlyPaths", Fate::Done),
    (
        "linux.seccomp",
        Fate::LeftOut("system calls are the guest kernel's, and none of them is the host's"),
    ),
    ("linux.devices", Fate::LeftOut("no device of the host is the guest's")),
    ("linux.resources.devices", Fate::LeftOut("no device of the host is the guest's")),
    ("linux.resources.memory", Fate::LeftOut("--memory is what the guest has in all")),
    ("linux.resources.cpu", Fate::LeftOut("--cpus is what the guest has in all")),
    ("linux.resources", Fate::LeftOut(NO_CGROUP)),
    ("linux.cgroupsPath", Fate::LeftOut(NO_CGROUP)),
    ("linux.mountLabel", Fate::LeftOut("the guest has no SELinux")),
    ("linux.rootfsPropagation", Fate::LeftOut("no mount of the guest is seen by the host")),
    ("linux.intelRdt", Fate::LeftOut(THE_GUESTS_OWN)),
    ("linux.memoryPolicy", Fate::LeftOut(THE_GUESTS_OWN)),
    ("linux.netDevices", Fate::LeftOut("the guest has no network")),
    ("windows", ANOTHER_PLATFORM),
    ("solaris", ANOTHER_PLATFORM),
    ("zos", ANOTHER_PLATFORM),
    ("freebsd", ANOTHER_PLATFORM),
    ("vm", Fate::Refused("the machine is what the options of `oriel run` say; leave it")),
];

/// Takes out of `config` what does not count, and returns a line for each such field that says anything.
///
/// # Errors
///
/// A field without which the bundle is not what it is meant to be; another version; what is no configuration at all.
pub fn check(config: &mut Value) -> Result<Vec<String>> {
    let Value::Object(fields) = &*config else {
        bail!("is no object; `runc spec` writes one");
    };
    match fields.get("ociVersion") {
        Some(Value::String(version)) if version.starts_with("1.") => {}
        version => {
            let shown = version.unwrap_or(&Value::Null);
            bail!("ociVersion: {shown}: it is no bundle of version 1; write \"1.0.2\" or the like");
        }
    }
    let mut lines = Vec::new();
    visit("", config, &mut lines)?;
    Ok(lines)
}

fn visit(path: &str, value: &mut Value, lines: &mut Vec<String>) -> Result<()> {
    let Value::Object(fields) = value else { return Ok(()) };
    let mut left_out = Vec::new();
    for (name, value) in fields.iter_mut() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let known = FIELDS.iter().find(|(field, _)| *field == path).map(|(_, fate)| *fate);
        // There are fields below it that have a fate of their own.
        let inner = format!("{path}.");
        let parent = FIELDS.iter().any(|(field, _)| field.starts_with(&inner));
        match known {
            Some(Fate::Done | Fate::Meaningless) => continue,
            _ if parent && value.is_object() => {
                visit(&path, value, lines)?;
                continue;
            }
            _ if says_nothing(value) => {}
            _ if parent => bail!("{path}: is no object; `runc spec` shows what it is"),
            Some(Fate::Refused(why)) => bail!("{path}: {why}"),
            Some(Fate::LeftOut(why)) => lines.push(format!("{path} is left out: {why}")),
            None => match ancestor(&path) {
                Some(why) => lines.push(format!("{path} is left out: {why}")),
                None => lines.push(format!("{path} is left out: oriel does not know it")),
            },
        }
        left_out.push(name.clone());
    }
    for name in left_out {
        fields.remove(&name);
    }
    Ok(())
}

/// Why the fields around this one are left out.
fn ancestor(path: &str) -> Option<&'static str> {
    FIELDS.iter().find_map(|(field, fate)| match fate {
        Fate::LeftOut(why) if path.starts_with(&format!("{field}.")) => Some(*why),
        _ => None,
    })
}

/// It is as if it were not there.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(says_nothing),
    }
}
