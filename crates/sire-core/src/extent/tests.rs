//! Claims, frees and what is said about offsets, of one extent alone.

use super::*;

fn large() -> (Arc<Extent>, Claim) {
    Extent::new(Addr(0x1000), (10, 9, 4), Device(0), RegionId(0), None)
}

#[test]
fn chunks_cover_the_extent() {
    let (_, claim) = large();
    let ranges: Vec<_> = claim.chunks.iter().map(Chunk::range).collect();
    assert_eq!(ranges, vec![0..4, 4..8, 8..10]);
}

#[test]
fn a_free_during_a_claim_is_left_to_the_claimant() {
    let (extent, claim) = large();
    assert!(extent.claim().is_none());
    assert!(matches!(extent.free(), Freed::Deferred));
    assert!(matches!(extent.free(), Freed::Already));
    let Err(Unfinished::Freed(claim)) = claim.put_back() else { unreachable!("the free was forgotten") };
    claim.bury();
    assert!(extent.claim().is_none());
    assert_eq!(extent.claim_freed().map(|c| c.chunks.len()), Some(3));
}

#[test]
fn a_panic_keeps_the_chunks() {
    let (extent, claim) = large();
    drop(claim);
    assert_eq!(extent.chunks(<[Chunk]>::len), Some(3));
}

#[test]
fn new_peers_reach_a_claimed_extent() {
    let (extent, claim) = large();
    assert!(extent.refresh_access().is_none());
    let Err(Unfinished::AccessStale(claim)) = claim.put_back() else { unreachable!("the peer was forgotten") };
    assert!(claim.put_back().is_ok());
    assert!(extent.refresh_access().is_some());
}

#[test]
fn what_is_noted_during_a_proof_is_not_forgotten_with_what_was_proven() {
    let (extent, claim) = large();
    extent.note_changed(&Ranges::of(0..4));
    let taken = extent.take_changed();
    extent.put_changed(&taken);
    extent.note_changed(&Ranges::of(2..4));
    extent.forget_changed(&(0..4));
    assert_eq!(extent.take_changed(), Ranges::of(2..4));
    drop(claim);
}

#[test]
fn later_overrides_win() {
    let (extent, claim) = large();
    drop(claim);
    extent.set_override(&(0..6), true);
    extent.set_override(&(2..4), false);
    let mut expected = Ranges::of(0..2);
    expected.add(4..6);
    assert_eq!(extent.ranges_to_save(false, 0), expected);
    extent.set_override(&(3..20), true);
    assert_eq!(extent.ranges_to_save(false, 0).total(), 2 + 6);
    assert_eq!(extent.ranges_to_save(true, 0).total(), 8);
}
