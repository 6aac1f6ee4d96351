//! Files that are not ledgers, ledgers that others have written to, and users that must not be kept out.

use sire_ledger::layout::{self, Record, State};
use sire_ledger::{Error, Ledger, Memory, Patience, Want};
use std::cell::Cell;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const NOW: Patience<'static> = Patience { timeout: Some(std::time::Duration::ZERO), cancelled: &|| false };

fn full() -> Option<Memory> {
    Some(Memory { free: 100, total: 100 })
}

fn refused(dir: &Path) -> String {
    match Ledger::open(dir, "GPU-1") {
        Ok(_) => "it was opened".into(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_no_ledger_is_refused_and_left_alone() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("sire-ledger-GPU-1");
    for (bytes, found) in [(b"hello".to_vec(), "5 bytes"), (vec![7; layout::FILE as usize], "does not begin with")] {
        std::fs::write(&path, &bytes)?;
        assert!(refused(dir.path()).contains(found), "{}", refused(dir.path()));
        assert_eq!(std::fs::read(&path)?, bytes);
    }
    let mut newer = vec![0; layout::FILE as usize];
    newer[..layout::HEADER_USED].copy_from_slice(&layout::header());
    newer[8] = 9;
    std::fs::write(&path, &newer)?;
    assert!(refused(dir.path()).contains("version 9"), "{}", refused(dir.path()));
    std::fs::remove_file(&path)?;
    std::fs::create_dir(&path)?;
    assert!(!refused(dir.path()).contains("opened"));
    Ok(())
}

#[test]
fn a_wreck_is_made_anew_unless_somebody_is_in_it() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("sire-ledger-GPU-1");
    let damage = |at: u64| std::fs::OpenOptions::new().write(true).open(&path)?.write_all_at(&[0xff], at);
    let member = Ledger::open(dir.path(), "GPU-1")?.join()?;
    member.reserve(Want::Bytes(60), &full, NOW)?;
    damage(20)?;
    assert!(refused(dir.path()).contains("header is damaged"), "{}", refused(dir.path()));
    drop(member);
    let before = Ledger::open(dir.path(), "GPU-1")?;
    for harm in [20, layout::FILE] {
        damage(harm)?;
        assert_eq!(Ledger::open(dir.path(), "GPU-1")?.join()?.reserve(Want::Bytes(100), &full, NOW)?, 100);
    }
    std::fs::OpenOptions::new().write(true).open(&path)?.set_len(9)?;
    Ledger::open(dir.path(), "GPU-1")?.join()?;
    assert!(matches!(before.join(), Err(Error::Foreign { .. })), "two ledgers of one GPU at once");
    Ok(())
}

#[test]
fn what_others_left_in_a_slot_is_not_taken_for_the_next_ones() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("sire-ledger-GPU-1"))?;
    let lie = Record { sequence: u64::MAX, state: State::Holding, bytes: u64::MAX, ..Record::default() };
    file.write_all_at(&layout::encode(&lie), layout::HEADER)?;
    file.write_all_at(&layout::encode(&lie), layout::HEADER + layout::COPY as u64)?;
    let member = ledger.join()?;
    let entries = ledger.entries()?;
    assert_eq!((entries[0].slot, entries[0].state, entries[0].bytes), (0, State::Idle, 0));
    assert_eq!(member.reserve(Want::Rest { margin: 1 }, &full, NOW)?, 99);
    assert_eq!(ledger.entries()?[0].bytes, 99);
    Ok(())
}

#[test]
fn links_and_pipes_are_not_followed() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("sire-ledger-GPU-1");
    let victim = dir.path().join("victim");
    std::fs::write(&victim, "precious")?;
    symlink(&victim, &path)?;
    assert!(!refused(dir.path()).contains("opened"));
    assert_eq!(std::fs::read_to_string(&victim)?, "precious");
    std::fs::remove_file(&path)?;
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: `name` is a NUL-terminated string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o666) }, 0);
    assert!(refused(dir.path()).contains("a pipe"), "{}", refused(dir.path()));
    Ok(())
}

#[test]
fn what_a_hostile_user_writes_costs_at_most_a_place() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("sire-ledger-GPU-1"))?;
    // A record that says it holds everything, in a slot that nobody lives in.
    let lie = Record { sequence: u64::MAX, state: State::Holding, bytes: u64::MAX, ticket: 7, ..Record::default() };
    file.write_all_at(&layout::encode(&lie), layout::HEADER + 5 * layout::SLOT)?;
    assert!(ledger.entries()?.is_empty(), "only who lives is counted");
    let member = ledger.join()?;
    member.reserve(Want::Bytes(100), &full, NOW)?;
    // Noise over every slot: our own next change makes our record whole again.
    file.write_all_at(&vec![0xa5; (layout::FILE - layout::HEADER) as usize], layout::HEADER)?;
    assert!(ledger.entries()?.is_empty());
    member.note_owned(50)?;
    assert_eq!(ledger.entries()?.iter().map(|e| (e.bytes, e.owned)).collect::<Vec<_>>(), [(100, 50)]);
    // The highest ticket there is: later ones do not overflow, and are still served.
    let last = Record { sequence: 1, state: State::Idle, ticket: u64::MAX, ..Record::default() };
    file.write_all_at(&layout::encode(&last), layout::HEADER + 9 * layout::SLOT)?;
    member.reserve(Want::Bytes(100), &full, NOW)?;
    // Cut short while in use: an error, not a signal.
    file.set_len(layout::HEADER)?;
    assert!(matches!(member.shrink(1), Err(Error::Io { .. })) && matches!(ledger.entries(), Err(Error::Io { .. })));
    Ok(())
}

/// Somebody wrote the last sequence number there is into a living holder's slot. Its owner's next change began again at 1, in the other copy, so that
/// what was forged counted for as long as the owner lived.
#[test]
fn what_is_forged_in_a_living_slot_lasts_until_its_owners_next_change() -> Outcome {
    let forged = Record { sequence: u64::MAX, state: State::Holding, bytes: 7, owned: 7, ..Record::default() };
    let copies = [0, layout::COPY as u64];
    for (changes, forged_at) in (0..4).flat_map(|n| [&copies[..1], &copies[1..], &copies].map(|at| (n, at))) {
        let dir = tempfile::tempdir()?;
        let ledger = Ledger::open(dir.path(), "GPU-1")?;
        let (member, other) = (ledger.join()?, ledger.join()?);
        member.reserve(Want::Bytes(40), &full, NOW)?;
        // Whichever of the two copies is the newer one.
        (0..changes).try_for_each(|owned| member.note_owned(owned))?;
        let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("sire-ledger-GPU-1"))?;
        for at in forged_at {
            file.write_all_at(&layout::encode(&forged), layout::HEADER + at)?;
        }
        assert_eq!(ledger.entries()?[0].bytes, 7, "it was not forged, so this shows nothing");
        for owned in [20, 21, 22] {
            member.note_owned(owned)?;
            let entry = &ledger.entries()?[0];
            assert_eq!((entry.bytes, entry.owned), (40, owned), "after {changes} changes, forged at {forged_at:?}");
        }
        assert_eq!(
            other.reserve(Want::Rest { margin: 0 }, &full, NOW).map_err(|error| error.to_string()),
            Err(SHARED.into())
        );
    }
    Ok(())
}

const SHARED: &str = "no reservation of 0 bytes in the time given: one other process holds a reservation";

/// The driver failed for one look, and whoever was next got all that it asked for, though others had it.
#[test]
fn where_the_driver_does_not_say_what_is_free_nothing_is_granted() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let (holder, member) = (ledger.join()?, ledger.join()?);
    holder.reserve(Want::Bytes(60), &full, NOW)?;
    let asked = Cell::new(0);
    // It says how much there is, and then nothing more.
    let once = || {
        asked.set(asked.get() + 1);
        (asked.get() == 1).then(full).flatten()
    };
    for want in [Want::Bytes(50), Want::Bytes(10), Want::Rest { margin: 0 }] {
        asked.set(0);
        let refused = member.reserve(want, &once, NOW).map_err(|error| error.to_string());
        assert!(
            refused.as_ref().is_err_and(|why| why.ends_with("the driver does not say how much memory is free")),
            "{refused:?}"
        );
    }
    // It begins to speak while somebody waits.
    asked.set(0);
    let later = || {
        asked.set(asked.get() + 1);
        (asked.get() == 1 || asked.get() > 4).then(full).flatten()
    };
    let patient = Patience { timeout: Some(std::time::Duration::from_secs(60)), ..NOW };
    assert_eq!(member.reserve(Want::Bytes(40), &later, patient)?, 40);
    member.release()?;
    // It never says anything: whoever would wait for ever is told so.
    for timeout in [NOW.timeout, None] {
        let refused = member.reserve(Want::Rest { margin: 0 }, &|| None, Patience { timeout, ..NOW });
        assert!(matches!(refused, Err(Error::Speechless)), "{refused:?}");
    }
    assert_eq!(ledger.entries()?.iter().map(|entry| entry.bytes).collect::<Vec<_>>(), [60, 0]);
    Ok(())
}

#[test]
fn every_user_may_write_and_nobody_loses_his_umask() -> Outcome {
    let dir = tempfile::tempdir()?;
    let _ledger = Ledger::open(dir.path(), "GPU-1")?;
    let mode = std::fs::metadata(dir.path().join("sire-ledger-GPU-1"))?.permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 1, "no draft stays");
    Ok(())
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let message = refused(Path::new("/nonexistent-directory"));
    assert!(message.contains("/nonexistent-directory"), "{message}");
}

#[test]
fn a_full_ledger_says_so() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let members = (0..layout::SLOTS).map(|_| ledger.join()).collect::<Result<Vec<_>, _>>()?;
    assert!(matches!(ledger.join(), Err(Error::Full { slots: 256 })));
    drop(members);
    ledger.join()?;
    Ok(())
}
