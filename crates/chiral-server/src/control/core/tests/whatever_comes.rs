//! Whatever comes in whatever order: what must hold of every row that reaches the robot.

use chiral_proto::{ActionChunk, message::ActionMessage};
use proptest::{collection::vec, prelude::*, sample::select};

use super::rig::{Did, Rig, assert_no_burst, at};
use crate::control::command::Command;

/// What happens next, after a pause in ms.
#[derive(Clone, Debug)]
enum Input {
    /// An action of this many rows is sent, and is on its way for this long at least, in ms.
    Send {
        pause_ms: u16,
        rows: u8,
        transit_ms: u16,
        /// Whether it says when it was sent.
        is_stamped: bool,
    },
    /// An action of another session, of one that states another session, or of another episode.
    Foreign {
        pause_ms: u16,
        session: u64,
        stated_session: u64,
        episode: u64,
    },
    Reset {
        pause_ms: u16,
    },
    Step {
        pause_ms: u16,
        rows: u8,
    },
    Silence {
        pause_ms: u16,
    },
    /// The controller is lost, and another one takes its place.
    NewSession {
        pause_ms: u16,
    },
}

/// What is known of a row that was sent and admitted.
#[derive(Clone, Debug)]
struct Sent {
    session: u64,
    episode: u64,
    action: usize,
    is_chunk: bool,
    admitted_ms: f64,
    lateness_ms: f64,
}

fn inputs() -> impl Strategy<Value = Input> {
    let pause = || prop_oneof![4 => 0_u16..5, 4 => 5_u16..120, 1 => 120_u16..3000];
    let rows = prop_oneof![6 => Just(1_u8), 1 => 2_u8..40];
    let transit = prop_oneof![4 => 2_u16..6, 2 => 6_u16..300, 1 => 300_u16..5000];
    let stamped = prop_oneof![9 => Just(true), 1 => Just(false)];
    prop_oneof![
        30 => (pause(), rows, transit, stamped).prop_map(|(pause_ms, rows, transit_ms, is_stamped)| {
            Input::Send { pause_ms, rows, transit_ms, is_stamped }
        }),
        2 => (pause(), 0_u64..2, 0_u64..2, 0_u64..2).prop_map(|(pause_ms, session, stated_session, episode)| {
            Input::Foreign { pause_ms, session, stated_session, episode }
        }),
        1 => pause().prop_map(|pause_ms| Input::Reset { pause_ms }),
        1 => (pause(), 1_u8..20).prop_map(|(pause_ms, rows)| Input::Step { pause_ms, rows }),
        1 => pause().prop_map(|pause_ms| Input::Silence { pause_ms }),
        1 => pause().prop_map(|pause_ms| Input::NewSession { pause_ms }),
    ]
}

proptest! {
    // Failing cases are not persisted: add a test for them here.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_late_foreign_or_overtaken_reaches_the_robot(
        inputs in vec(inputs(), 1..200),
        hz in select(vec![5.0, 20.0, 100.0]),
        row_ms in select(vec![0.0, 3.0, 45.0, 400.0]),
        reset_ms in select(vec![0.0, 700.0]),
        observe_ms in select(vec![0.0, 900.0]),
    ) {
        let mut rig = Rig::new(hz);
        (rig.row_ms, rig.reset_ms, rig.observe_ms) = (row_ms, reset_ms, observe_ms);
        let sent = feed(&mut rig, &inputs);
        check_rows(&rig, &sent, hz);
    }
}

/// Feeds the inputs to the robot. Returns what was sent, where it was admitted; the value of a row is its
/// index. The rows of steps have the value -1.
fn feed(rig: &mut Rig, inputs: &[Input]) -> Vec<Option<Sent>> {
    let mut sent = Vec::new();
    let (mut sent_ms, mut arrived_ms, mut quickest_ms) = (0.0, 0.0, f64::MAX);
    for (action, input) in inputs.iter().enumerate() {
        let (pause_ms, transit_ms) = match input {
            Input::Send { pause_ms, transit_ms, .. } => (*pause_ms, *transit_ms),
            Input::Foreign { pause_ms, .. }
            | Input::Reset { pause_ms }
            | Input::Step { pause_ms, .. }
            | Input::Silence { pause_ms }
            | Input::NewSession { pause_ms } => (*pause_ms, 2),
        };
        sent_ms += f64::from(pause_ms);
        // A connection keeps the order of what is sent.
        arrived_ms = f64::max(sent_ms + f64::from(transit_ms), arrived_ms);
        rig.run(arrived_ms);
        match input {
            Input::Send { rows, is_stamped, .. } => {
                let values = (0..*rows).map(|i| (sent.len() + usize::from(i)) as f32).collect();
                let late = rig.core.counts().late;
                let (session, episode) = (rig.session, rig.core.episode());
                let values = ActionChunk::new(1, values).unwrap();
                let admitted = match is_stamped {
                    true => rig.arrive(values, sent_ms),
                    false => rig.arrive_unstamped(values),
                };
                if *is_stamped {
                    quickest_ms = f64::min(quickest_ms, arrived_ms - sent_ms);
                }
                let row = Sent {
                    session,
                    episode,
                    action,
                    is_chunk: *rows > 1,
                    admitted_ms: arrived_ms,
                    lateness_ms: if *is_stamped { arrived_ms - sent_ms - quickest_ms } else { 0.0 },
                };
                let is_admitted = admitted.is_ok() && rig.core.counts().late == late;
                sent.extend((0..*rows).map(|_| is_admitted.then(|| row.clone())));
            }
            Input::Foreign { session, stated_session, episode, .. } => {
                let is_foreign = session + stated_session + episode > 0;
                let message = ActionMessage {
                    session: rig.session - stated_session,
                    episode: rig.core.episode().wrapping_sub(*episode),
                    actions: [if is_foreign { FOREIGN } else { -1.0 }].into(),
                    ..ActionMessage::default()
                };
                let act = Command::Act(message);
                let admitted = rig.core.admit(rig.session - session, act, (), at(arrived_ms));
                assert!(admitted.is_err() || !is_foreign, "{input:?}");
            }
            Input::Reset { .. } => rig.reset(),
            Input::Step { rows, .. } => {
                let chunk = ActionChunk::new(1, vec![-1.0; usize::from(*rows)]).unwrap();
                let step = Command::Step { session: rig.session, episode: rig.core.episode(), chunk };
                // Refused during a reset.
                let _ = rig.core.admit(rig.session, step, (), at(arrived_ms));
            }
            Input::Silence { .. } => rig.core.note_silence(rig.session, at(arrived_ms)),
            Input::NewSession { .. } => {
                assert!(rig.core.release(rig.session, "lost", at(arrived_ms)));
                rig.session += 1;
                rig.core.claim(rig.session, "next", at(arrived_ms)).unwrap();
                quickest_ms = f64::MAX;
            }
        }
    }
    rig.run(arrived_ms + 1e6);
    sent
}

/// The value of actions that must not reach the robot.
const FOREIGN: f32 = -2.0;

/// Checks every row that reached the robot.
fn check_rows(rig: &Rig, sent: &[Option<Sent>], hz: f64) {
    let rows = rig.rows();
    assert_no_burst(&rows, hz);
    assert!(rows.iter().all(|row| row.1 != FOREIGN), "foreign: {rows:?}");
    let values: Vec<f32> = rows.iter().map(|row| row.1).filter(|value| *value >= 0.0).collect();
    assert!(values.is_sorted_by(|a, b| a < b), "in another order, or twice: {values:?}");
    let drift_ms = rig.now_ms / 1000.0;
    let mut episode = (0, 0);
    for (at, row) in rows.iter().filter(|(_, value)| *value >= 0.0) {
        let row = sent[*row as usize].as_ref().expect("only admitted rows are applied");
        assert!(row.lateness_ms <= 250.0 + drift_ms, "late: {row:?}");
        let overtook = |newer: &&Sent| newer.is_chunk && newer.action > row.action && newer.admitted_ms < *at;
        let newer = sent.iter().flatten().find(overtook);
        assert!(newer.is_none(), "overtaken: applied at {at}: {row:?}, after {newer:?}");
        assert!((row.session, row.episode) >= episode, "foreign: applied at {at}: {row:?}");
        episode = (row.session, row.episode);
    }
    // The time from the last hold or reset to each row tells the session and episode it was applied in.
    let mut admitted_after = 0.0;
    for (at, did) in &rig.did {
        match did {
            Did::Hold(_) | Did::Reset => admitted_after = *at,
            Did::Row(value) if *value >= 0.0 => {
                let row = sent[*value as usize].as_ref().expect("checked above");
                let is_fresh = row.admitted_ms >= admitted_after;
                assert!(is_fresh, "foreign: applied at {at}, after a stop at {admitted_after}: {row:?}");
            }
            _ => {}
        }
    }
    let last_row = rig.did.iter().rposition(|(_, did)| matches!(did, Did::Row(_)));
    let last_stop = rig.did.iter().rposition(|(_, did)| matches!(did, Did::Hold(_) | Did::Reset));
    assert!(last_row <= last_stop, "the robot does not hold at the end");
}
