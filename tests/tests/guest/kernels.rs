//! Kernels and initrds of every form.

use std::fs;
use std::path::Path;

use integration::{Oriel, Tree, busybox, text, vmlinux, vmlinuz};
use oriel_init::initramfs::Archive;

#[test]
fn a_bzimage_unpacks_itself_when_told_to() {
    let kernel = vmlinuz();
    let script = "echo version=$(uname -r); echo cmdline=$(cat /proc/cmdline)";
    let outcome =
        Oriel::run(&["--no-unpack", "--kernel", text(&kernel), "--cmdline", "one.more=word"])
            .script(script)
            .finish();
    outcome.exits_with(0).says_no_error();
    let cmdline = outcome.value("cmdline");
    outcome.check(cmdline.contains("one.more=word"), "--cmdline adds words");
    let plain = Oriel::run(&["--kernel", text(&vmlinux())]).script(script).finish();
    plain.exits_with(0).says_no_error();
    plain.check(
        plain.value("version") == outcome.value("version"),
        "an ELF file is the same kernel",
    );
}

/// An initramfs with busybox and a script.
fn initramfs(path: &Path, script: &str) {
    let program = fs::read(busybox()).unwrap();
    let directories = ["bin", "dev", "proc", "sys"].map(|name| (name, 0o040755, &b""[..]));
    let files =
        [("bin/busybox", 0o100755, program.as_slice()), ("init", 0o100755, script.as_bytes())];
    archive(path, &[&directories[..], &files].concat());
}

/// A cpio archive of files and directories: name, mode, content.
pub(super) fn archive(path: &Path, entries: &[(&str, u32, &[u8])]) {
    let mut archive = Archive::default();
    for (name, mode, content) in entries {
        archive.add(name, *mode, content).unwrap();
    }
    fs::write(path, archive.finish().unwrap()).unwrap();
}

#[test]
fn a_foreign_initramfs_has_the_console_and_the_shares() {
    let tree = Tree::new();
    let initrd = tree.path("initrd");
    let script = r#"#!/bin/busybox sh
        /bin/busybox --install -s /bin
        mount -t proc proc /proc
        mount -t devtmpfs dev /dev
        mkdir /s
        mount -t virtiofs share0 /s && echo "mounted=yes"
        echo "secret=$(cat /s/secret)"
        read line
        echo "input=$line"
        echo from the guest >/s/answer
        umount /s
        poweroff -f
    "#;
    initramfs(&initrd, script);
    tree.write("secret", b"of the host");
    let mut guest = Oriel::run(&["--initrd", text(&initrd), "-i", "-v", &tree.at("/ignored", "")])
        .default_console()
        .start();
    // The kernel empties the port when it opens the console: what is typed before may be lost.
    while !guest.hear().contains("secret=") {}
    guest.say("typed");
    let outcome = guest.finish();
    outcome.exits_with(0).says_no_error();
    // The console ends its lines as a terminal does, and shows the kernel's too.
    for line in ["mounted=yes\r\n", "secret=of the host\r\n", "input=typed\r\n"] {
        outcome.check(outcome.text().contains(line), &format!("standard output has {line:?}"));
    }
    assert_eq!(tree.read("answer"), b"from the guest\n", "the share is written");
}

#[test]
fn the_kernel_mounts_its_root_from_the_share_without_an_initrd() {
    let root = Tree::root();
    let init = r#"#!/bin/sh
        exec >/log 2>&1
        mount -t proc proc /proc
        mount -t devtmpfs dev /dev
        echo "root=$(cat /proc/mounts)"
        echo "user=$(stat -c %u /bin/busybox)"
        echo written >/written
        echo "on the console" >/dev/ttyS0
        mount -o remount,ro /
        poweroff -f
    "#;
    root.write("init-script", init.as_bytes());
    integration::copy_executable(&root.path("init-script"), &root.path("sbin/init"));
    let outcome = Oriel::run(&[
        "--initrd",
        "none",
        "--root",
        &format!("{}:dax=always,tag=rootfs", root.text()),
    ])
    .default_console()
    .finish();
    outcome.exits_with(0).says_no_error();
    outcome.check(outcome.text().contains("on the console"), "the console is standard output");
    let log = String::from_utf8(root.read("log")).unwrap();
    assert!(log.contains("rootfs / virtiofs rw"), "root=TAG rootfstype=virtiofs: {log}");
    assert!(log.contains("dax=always"), "rootflags: {log}");
    assert_eq!(root.read("written"), b"written\n", "the root is written");

    let reboot = "#!/bin/sh\nreboot -f\n";
    root.write("init-script", reboot.as_bytes());
    integration::copy_executable(&root.path("init-script"), &root.path("other-init"));
    let outcome = Oriel::run(&["--initrd", "none", "--root", &format!("{}:ro", root.text())])
        .args(&["--cmdline", "init=/other-init"])
        .finish();
    outcome.exits_with(125);
    outcome.check(outcome.stderr.contains("reset"), "a reset is told of");
}
