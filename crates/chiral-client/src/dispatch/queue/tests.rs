//! Which row is sent when, on virtual time.

use super::*;

const MS: i64 = 1_000_000;

fn queue(capacity: usize, hz: Option<f64>) -> RowQueue {
    let mut queue = RowQueue::new(capacity);
    if let Some(hz) = hz {
        queue.start(Rate::new(hz).unwrap(), Timestamp(0));
    }
    queue
}

/// Rows with these values.
fn numbered(values: std::ops::Range<usize>) -> impl ExactSizeIterator<Item = Row> {
    values.map(|value| Row { values: vec![value as f32], from: ObservationRef::default(), valid_for: None })
}

fn rows(count: usize) -> impl ExactSizeIterator<Item = Row> {
    numbered(0..count)
}

fn put(queue: &mut RowQueue, count: usize, mode: PutMode, ms: i64) -> Result<bool, Error> {
    queue.put(rows(count), mode, Timestamp(ms * MS))
}

fn is_sent(queue: &mut RowQueue, ms: i64) -> bool {
    matches!(queue.next(Timestamp(ms * MS)), Next::Row(_))
}

/// Runs dispatch for `seconds`, woken `late_ns` after each deadline. Returns how many rows it sent and
/// how many ticks it skipped.
fn check(hz: f64, seconds: i64, late_ns: impl Fn(u64) -> i64) -> (u64, u64) {
    let mut queue = queue(16, Some(hz));
    let (mut now, mut sent) = (Timestamp(0), 0);
    loop {
        if queue.len() == 0 {
            queue.put(rows(16), PutMode::Append, now).unwrap();
        }
        now = now + queue.ticker.as_ref().unwrap().due_in(now) + Duration::from_nanos(late_ns(sent) as u64);
        if now >= Timestamp(seconds * 1000 * MS) {
            return (sent, queue.skipped());
        }
        sent += u64::from(matches!(queue.next(now), Next::Row(_)));
    }
}

#[test]
fn the_rate_is_held_on_absolute_deadlines() {
    assert_eq!(check(100.0, 60, |_| 0), (6000, 0));
    assert_eq!(check(100.0, 60, |n| (n % 9) as i64 * MS), (6000, 0));
    assert_eq!(check(30.0, 60, |_| 100_000), (1800, 0));
}

#[test]
fn missed_ticks_are_skipped_and_counted() {
    let (sent, skipped) = check(100.0, 60, |n| if n == 1000 { 255 * MS } else { 0 });
    assert_eq!((sent, skipped), (6000 - 25, 25));
}

#[test]
fn a_row_that_is_queued_late_waits_for_the_next_tick() {
    let mut queue = queue(4, Some(10.0));
    put(&mut queue, 2, PutMode::Append, 250).unwrap();
    assert!(matches!(queue.next(Timestamp(250 * MS)), Next::In(wait) if wait == Duration::from_millis(50)));
    assert!(is_sent(&mut queue, 300));
    assert!(!is_sent(&mut queue, 301), "one row a tick");
    assert_eq!(queue.skipped(), 0);
}

#[test]
fn lateness_is_counted_from_the_tick_that_a_row_was_sent_at() {
    let mut queue = queue(4, Some(10.0));
    put(&mut queue, 3, PutMode::Append, 0).unwrap();
    for ms in [3, 100, 457] {
        assert!(is_sent(&mut queue, ms));
    }
    assert_eq!(queue.lateness(), [0, 3, 57].map(Duration::from_millis));
}

#[test]
fn all_rows_fit_or_none() {
    let mut queue = queue(4, None);
    put(&mut queue, 3, PutMode::Append, 0).unwrap();
    assert!(put(&mut queue, 2, PutMode::Append, 0).is_err());
    assert_eq!(queue.len(), 3);
    put(&mut queue, 4, PutMode::Replace, 0).unwrap();
    assert_eq!(queue.len(), 4);
    assert!(put(&mut queue, 5, PutMode::Replace, 0).is_err());
}

/// What happens at 10 Hz, whose ticks are at 0, 100, 200 ms and so on.
#[derive(Clone, Debug)]
enum Step {
    /// Rows with these values are put at this time, for as soon as their turn comes.
    Put(i64, std::ops::Range<usize>, PutMode),
    /// The same, from the first tick at or after the third number on.
    PutAt(i64, std::ops::Range<usize>, i64, PutMode),
    /// The dispatch thread sleeps until this time, whatever is due.
    StallUntil(i64),
}
use PutMode::{Append, Replace};
use Step::{Put, PutAt, StallUntil};

/// Carries out these steps, then runs dispatch until nothing is queued. Expects these rows to be sent, as
/// (ms, value), and that many to be missed.
#[track_caller]
fn check_sent(steps: &[Step], expected: &[(i64, usize)], missed: u64) {
    let mut queue = queue(8, Some(10.0));
    let mut sent = Vec::new();
    let mut ms = 0;
    for step in steps {
        let (Put(at, ..) | PutAt(at, ..) | StallUntil(at)) = *step;
        while ms < at {
            if !matches!(step, StallUntil(_)) {
                sent.extend(send(&mut queue, ms));
            }
            ms += 1;
        }
        let now = Timestamp(ms * MS);
        match step.clone() {
            Put(_, rows, mode) => assert!(queue.put(numbered(rows), mode, now).is_ok()),
            PutAt(_, rows, start_at, mode) => {
                assert!(queue.put_at(numbered(rows), mode, Timestamp(start_at * MS), now).is_ok());
            }
            StallUntil(_) => {}
        }
    }
    while queue.len() > 0 {
        sent.extend(send(&mut queue, ms));
        ms += 1;
    }
    assert_eq!((&sent[..], queue.missed()), (expected, missed), "{steps:?}");
    assert!(queue.skipped() == 0 || steps.iter().any(|step| matches!(step, StallUntil(_))));
}

fn send(queue: &mut RowQueue, ms: i64) -> Option<(i64, usize)> {
    match queue.next(Timestamp(ms * MS)) {
        Next::Row(row) => Some((ms, row.values[0] as usize)),
        _ => None,
    }
}

#[test]
fn rows_with_a_start_take_their_ticks() {
    check_sent(&[PutAt(50, 0..2, 200, Append)], &[(200, 0), (300, 1)], 0);
    check_sent(&[PutAt(50, 0..2, 201, Append)], &[(300, 0), (400, 1)], 0);
    // The ticks at 0 and 100 have passed.
    check_sent(&[PutAt(150, 0..4, -30, Append)], &[(200, 2), (300, 3)], 2);
    check_sent(&[PutAt(250, 0..2, 0, Append)], &[], 2);
    // Ticks before the start are not missed ones, and the row that waits for its tick blocks no other.
    check_sent(&[PutAt(0, 10..11, 500, Append), PutAt(250, 0..1, 300, Append)], &[(300, 0), (500, 10)], 0);
}

#[test]
fn rows_with_a_start_replace_the_rows_at_their_ticks() {
    // The newer chunk overlaps the older one's end.
    let older = Put(0, 0..4, Append);
    check_sent(
        &[older.clone(), PutAt(50, 10..13, 200, Append)],
        &[(0, 0), (100, 1), (200, 10), (300, 11), (400, 12)],
        0,
    );
    // It lies within the older one.
    check_sent(&[older.clone(), PutAt(50, 10..11, 200, Append)], &[(0, 0), (100, 1), (200, 10), (300, 3)], 0);
    check_sent(
        &[PutAt(0, 0..4, 100, Append), PutAt(50, 10..12, 200, Append)],
        &[(100, 0), (200, 10), (300, 11), (400, 3)],
        0,
    );
    check_sent(&[older.clone(), PutAt(50, 10..11, 200, Replace)], &[(0, 0), (200, 10)], 0);
    // All its ticks have passed: the older one goes on.
    check_sent(&[older, PutAt(250, 10..12, 100, Replace)], &[(0, 0), (100, 1), (200, 2), (300, 3)], 2);
}

#[test]
fn rows_without_a_start_follow_those_that_have_one_or_replace_them() {
    let timed = PutAt(0, 0..2, 200, Append);
    check_sent(&[timed.clone(), Put(50, 10..12, Append)], &[(200, 0), (300, 1), (400, 10), (500, 11)], 0);
    check_sent(&[timed.clone(), Put(50, 10..12, Replace)], &[(100, 10), (200, 11)], 0);
    check_sent(&[timed, Put(250, 10..11, Replace)], &[(200, 0), (300, 10)], 0);
}

#[test]
fn after_a_stall_rows_with_a_start_keep_their_ticks() {
    let timed = PutAt(0, 0..5, 100, Append);
    check_sent(&[timed.clone(), StallUntil(320)], &[(320, 2), (400, 3), (500, 4)], 2);
    // What waits before them is overtaken.
    check_sent(
        &[Put(0, 10..12, Append), PutAt(0, 0..2, 200, Append), StallUntil(230)],
        &[(230, 0), (300, 1)],
        2,
    );
    check_sent(&[timed, Put(0, 10..11, Append), StallUntil(730)], &[(730, 10)], 5);
}

#[test]
fn a_chunk_that_comes_too_late_after_a_stall_changes_nothing() {
    for mode in [Replace, Append] {
        let late = PutAt(520, 10..12, 100, mode);
        check_sent(
            &[Put(0, 0..4, Append), StallUntil(520), late],
            &[(520, 0), (600, 1), (700, 2), (800, 3)],
            2,
        );
    }
}

#[test]
fn a_start_needs_dispatch_and_a_stop_drops_what_has_one() {
    let mut queue = queue(8, None);
    let put_at = |queue: &mut RowQueue, start_at| {
        queue.put_at(rows(2), Append, Timestamp(start_at), Timestamp(0)).map(drop)
    };
    assert!(matches!(put_at(&mut queue, 0), Err(Error::InvalidArgument { name: "start_at", .. })));
    queue.start(Rate::new(10.0).unwrap(), Timestamp(0));
    put_at(&mut queue, 100 * MS).unwrap();
    put(&mut queue, 1, Append, 0).unwrap();
    queue.start(Rate::new(20.0).unwrap(), Timestamp(0));
    assert_eq!((queue.len(), queue.missed()), (1, 2));
    put_at(&mut queue, 100 * MS).unwrap();
    queue.stop();
    assert_eq!((queue.len(), queue.missed()), (1, 4));
}

#[test]
fn rows_with_a_start_need_room_only_beside_those_that_stay() {
    let mut queue = queue(4, Some(10.0));
    put(&mut queue, 4, Append, 0).unwrap();
    let mut put_at =
        |count, start_at| queue.put_at(rows(count), Append, Timestamp(start_at * MS), Timestamp(0));
    assert!(matches!(put_at(2, 300), Err(Error::QueueFull { rows: 2, queued: 4, .. })));
    assert!(!put_at(2, 200).unwrap(), "the first row is the same");
    assert!(put_at(3, 0).unwrap(), "there is another first row");
    assert!(put_at(5, -100).is_ok(), "one of five has passed");
}
