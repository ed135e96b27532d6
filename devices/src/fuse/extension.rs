//! What a request that makes a file has behind its body: `struct fuse_ext_header` records.

use super::abi::{EXT_GROUPS, ExtHeader};
use super::errno::{Errno, Result};
use super::request::Decoder;

/// Extensions are whole multiples of so many bytes, and `total_extlen` of the header counts these.
pub const UNIT: usize = 8;

/// The supplementary group that counts for what is being made: the directory's group, when the process is in
/// it (`FUSE_CREATE_SUPP_GROUP`). The kernel sends this one or none, whatever groups the process has.
///
/// # Errors
///
/// `EINVAL` for records that are cut, not whole multiples of 8 bytes, or name more than one group. Those of
/// a kind that was not negotiated are passed over.
pub fn supplementary_group(mut extensions: Decoder<'_>) -> Result<Option<u32>> {
    let mut group = None;
    while !extensions.is_empty() {
        let header: ExtHeader = extensions.take()?;
        let size = usize::try_from(header.size).map_err(|_| Errno::INVAL)?;
        let payload = size.checked_sub(size_of::<ExtHeader>()).ok_or(Errno::INVAL)?;
        if !size.is_multiple_of(UNIT) {
            return Err(Errno::INVAL);
        }
        let mut payload = extensions.split_off(payload)?;
        if header.kind != EXT_GROUPS {
            continue;
        }
        match payload.take::<u32>()? {
            0 => {}
            1 if group.is_none() => group = Some(payload.take()?),
            _ => return Err(Errno::INVAL),
        }
    }
    Ok(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[u32]) -> Result<Option<u32>> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        supplementary_group(Decoder::new(&bytes))
    }

    #[test]
    fn the_one_group_of_a_process_is_found() {
        assert_eq!(parse(&[]), Ok(None));
        assert_eq!(parse(&[16, 32, 1, 777]), Ok(Some(777)));
        assert_eq!(parse(&[16, 32, 0, 0]), Ok(None));
        assert_eq!(parse(&[16, 1, 9, 9, 16, 32, 1, 5]), Ok(Some(5)), "behind another kind");
        assert_eq!(parse(&[8, 99]), Ok(None), "of no content");
    }

    #[test]
    fn a_malformed_extension_is_refused() {
        for wrong in [
            &[0, 32][..],
            &[4, 32],
            &[7, 32],
            &[12, 32, 0],
            &[16, 32, 1],
            &[24, 32, 1, 5],
            &[u32::MAX, 32, 1, 5],
            &[8, 32],
            &[12, 32, 1, 5],
            &[16, 32, 2, 5],
            &[24, 32, 2, 5, 6, 0],
            &[16, 32, u32::MAX, 5],
            &[16, 32, 1, 5, 16, 32, 1, 6],
            &[16],
        ] {
            assert_eq!(parse(wrong), Err(Errno::INVAL), "{wrong:?}");
        }
    }
}
