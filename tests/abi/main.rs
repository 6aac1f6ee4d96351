//! The committed header is the one that the sources make.

/// What `build.rs` has just generated.
const GENERATED: &str = include_str!(concat!(env!("OUT_DIR"), "/sire.h"));
const COMMITTED: &str = include_str!("../../include/sire.h");

#[test]
fn the_committed_header_is_current() {
    let differs = GENERATED.lines().zip(COMMITTED.lines()).find(|(generated, committed)| generated != committed);
    assert!(
        GENERATED == COMMITTED,
        "include/sire.h is not what cdylib/ says (first difference: {differs:?}); \
         run `SIRE_UPDATE_HEADER=1 cargo build -p sire-alloc` and commit the result"
    );
}
