//! The control core on virtual time: a robot that takes time for its work, and a network that delays what is
//! sent.

mod rig;
mod whatever_comes;

use std::time::Duration;

use chiral_proto::{ActionChunk, Code, Fault, clock::PingSample, message::ActionMessage};

use self::rig::{Did, NO_STALL, OFFSET_MS, Rig, SESSION, assert_no_burst, at, period};
use crate::{
    control::{
        command::{Command, Limits, OnTimeout, StopDue, Work},
        events::{ControlEvent, HoldReason},
    },
    robot::{Execution, ResetRequest},
};

// ---- Late, and in a burst -----------------------------------------------------------------------------------

#[test]
fn a_stalled_link_delivers_nothing_late_and_nothing_in_a_burst() {
    for (hz, cut_ms) in [(50.0, 3000.0), (20.0, 4000.0), (50.0, 8000.0)] {
        let mut rig = Rig::new(hz);
        rig.ping(2.0);
        let stall = (2000.0, 2000.0 + cut_ms);
        rig.stream(hz, 0.0, stall.1 + 2000.0, stall, true);
        rig.run(rig.now_ms + 100.0);
        let rows = rig.rows();
        assert_no_burst(&rows, hz);
        let oldest = rows.iter().map(|(at, i)| at - f64::from(*i) * period(hz)).fold(0.0, f64::max);
        assert!(
            oldest <= 252.0 + cut_ms / 1000.0,
            "{hz} Hz: a row was applied {oldest} ms after it was sent"
        );
        let after: Vec<_> = rows.iter().filter(|(at, _)| *at >= stall.1).collect();
        assert!(after.len() as f64 > 2000.0 / period(hz) - 3.0, "{hz} Hz: {} rows afterwards", after.len());
        let counts = rig.core.counts();
        assert_eq!(counts.refused, 0, "none of it is the policy's fault");
        assert_eq!(counts.late + counts.superseded + rows.len() as u64, rig.seq, "{counts:?}");
        assert!(counts.late > 0 && counts.superseded > 0, "{counts:?}");
        let dropped = rig.core.take_dropped(SESSION).unwrap();
        assert_eq!((dropped.late, dropped.superseded), (counts.late, counts.superseded));
        assert_eq!(rig.core.take_dropped(SESSION), None, "reported once");
        assert_eq!(rig.holds().len(), 1, "while nothing arrived");
    }
}

#[test]
fn of_a_burst_the_newest_row_runs() {
    let mut rig = Rig::new(20.0);
    rig.arrive([0.0], 0.0).unwrap();
    rig.run(150.0);
    for (value, sent_ms) in [(1.0, 50.0), (2.0, 100.0), (3.0, 150.0)] {
        rig.arrive([value], sent_ms).unwrap();
    }
    rig.run(400.0);
    assert_eq!(rig.rows(), [(0.0, 0.0), (150.0, 3.0)]);
    assert_eq!(rig.core.counts().superseded, 2);
}

#[test]
fn without_sent_times_a_stall_is_a_gap_and_then_a_burst() {
    let mut rig = Rig::new(20.0);
    rig.stream(20.0, 0.0, 8000.0, (2000.0, 6000.0), false);
    rig.run(8100.0);
    let rows = rig.rows();
    assert_no_burst(&rows, 20.0);
    let around: Vec<_> =
        rows.iter().filter(|(at, _)| (6000.0..6100.0).contains(at)).map(|row| row.1).collect();
    assert_eq!(around, [40.0, 120.0, 121.0], "the first, unknowingly, then the newest");
    assert_eq!(rig.core.counts().superseded, 79);
}

#[test]
fn rows_that_were_sent_together_run_at_the_control_rate() {
    for is_stamped in [true, false] {
        let mut rig = Rig::new(20.0);
        for i in 0..50 {
            rig.run(f64::from(i));
            let sent_ms = f64::from(i) - 2.0;
            match is_stamped {
                true => rig.arrive([i as f32], sent_ms).unwrap(),
                false => rig.arrive_unstamped([i as f32]).unwrap(),
            }
        }
        rig.run(2500.0);
        let expected: Vec<_> = (0..50).map(|i| (f64::from(i) * 50.0, i as f32)).collect();
        assert_eq!(rig.rows(), expected, "stamped: {is_stamped}");
    }
}

#[test]
fn rows_that_keep_coming_faster_than_the_robot_applies_them_do_not_pile_up() {
    for is_stamped in [true, false] {
        let mut rig = Rig::new(20.0);
        rig.stream(100.0, 0.0, 10_000.0, NO_STALL, is_stamped);
        rig.run(10_100.0);
        let rows = rig.rows();
        assert_no_burst(&rows, 20.0);
        assert!(rows.len() > 195, "stamped: {is_stamped}: {} rows", rows.len());
        let settled: Vec<_> = rows.iter().filter(|(at, _)| *at > 600.0).collect();
        let oldest = settled.iter().map(|(at, i)| at - f64::from(*i) * 10.0).fold(0.0, f64::max);
        assert!(oldest < 60.0, "stamped: {is_stamped}: a row was applied {oldest} ms after it was sent");
    }
}

#[test]
fn a_stall_before_the_first_row_of_a_legacy_client_is_one_too() {
    let mut rig = Rig::new(20.0);
    rig.reset();
    rig.run(4000.0);
    for i in 0..80 {
        rig.arrive_unstamped([i as f32]).unwrap();
    }
    rig.run(9000.0);
    assert_eq!(rig.rows(), [(4000.0, 79.0)]);
    // One that thinks before it acts at the robot's rate loses nothing.
    let mut rig = Rig::new(20.0);
    rig.run(4000.0);
    rig.stream(20.0, 4000.0, 5000.0, NO_STALL, false);
    rig.run(5100.0);
    assert_eq!(rig.rows().len(), 20);
}

#[test]
fn a_first_action_that_a_stall_delayed_is_late() {
    let mut rig = Rig::new(20.0);
    rig.ping(2.0);
    rig.run(3000.0);
    rig.arrive([1.0], 5.0).unwrap();
    rig.run(4000.0);
    assert_eq!(rig.did, []);
    assert_eq!(rig.core.counts().late, 1);
}

#[test]
fn clocks_that_run_apart_for_8_hours_make_nothing_late() {
    for ppm in [-500.0, 500.0] {
        let mut rig = Rig::new(20.0);
        for second in 0..8 * 3600 {
            let now_ms = f64::from(second) * 1000.0;
            rig.run(now_ms);
            rig.arrive([0.0], now_ms * (1.0 + ppm * 1e-6) - 2.0).unwrap();
        }
        rig.run(1e9);
        assert_eq!(rig.rows().len(), 8 * 3600, "{ppm} ppm");
    }
}

#[test]
fn a_client_that_was_suspended_goes_on() {
    // Its process was stopped for 5 s: what it stamped before is late, what it stamps afterwards is not.
    let mut rig = Rig::new(20.0);
    rig.stream(20.0, 0.0, 1000.0, NO_STALL, true);
    rig.run(6000.0);
    rig.arrive([100.0], 1000.0).unwrap();
    rig.run(6050.0);
    rig.arrive([101.0], 6048.0).unwrap();
    rig.run(6100.0);
    assert_eq!(rig.rows().last(), Some(&(6050.0, 101.0)));
    assert_eq!(rig.core.counts().late, 1);

    // Its whole host was: its clock stood still, too, so that everything seems late until a ping is answered.
    let mut rig = Rig::new(20.0);
    rig.stream(20.0, 0.0, 1000.0, NO_STALL, true);
    rig.run(6000.0);
    rig.arrive([100.0], 998.0).unwrap();
    let t3 = at(6010.0 - 5002.0 + OFFSET_MS);
    let answer = PingSample { t1: at(6006.0), t2: t3, t3, t4: at(6010.0) };
    assert!(rig.core.note_pong(SESSION, answer).is_some());
    assert_eq!(rig.core.note_pong(SESSION, answer), None, "noticed once");
    rig.run(6050.0);
    rig.arrive([101.0], 1048.0).unwrap();
    rig.run(6100.0);
    assert_eq!(rig.rows().last(), Some(&(6050.0, 101.0)));
}

#[test]
fn dispatch_at_500_hz_with_jitter_loses_nothing() {
    // With the second one, many rows arrive together, closer than half a period, although they were sent apart.
    for jitter_ms in [0.9, 1.7] {
        let mut rig = Rig::new(500.0);
        let random = |i: u32| f64::from((i.wrapping_mul(2_654_435_761) >> 8) % 1000) / 1000.0;
        for i in 0..5000 {
            let sent_ms = f64::from(i) * 2.0;
            rig.run(sent_ms + 1.0 + random(i) * jitter_ms);
            rig.arrive([i as f32], sent_ms).unwrap();
        }
        rig.run(10_100.0);
        assert_no_burst(&rig.rows(), 500.0);
        assert_eq!(rig.rows().len(), 5000, "{jitter_ms} ms");
    }
}

#[test]
fn an_undeclared_rate_paces_and_drops_nothing() {
    let mut rig = Rig::new(0.0);
    rig.row_ms = 30.0;
    for i in 0..20 {
        rig.run(f64::from(i));
        rig.arrive([i as f32], f64::from(i)).unwrap();
    }
    rig.run(1000.0);
    let expected: Vec<_> = (0..20).map(|i| (f64::from(i) * 30.0, i as f32)).collect();
    assert_eq!(rig.rows(), expected);
}

#[test]
fn an_action_may_say_how_long_it_is_valid() {
    let mut rig = Rig::new(20.0);
    rig.ping(2.0);
    let message = |rig: &Rig, valid_ms| ActionMessage {
        session: SESSION,
        actions: [1.0].into(),
        sent_at: Some(at(rig.now_ms - 102.0 + OFFSET_MS)),
        valid_for: Some(Duration::from_millis(valid_ms)),
        ..ActionMessage::default()
    };
    for (valid_ms, late) in [(80, 1), (120, 0)] {
        let act = Command::Act(message(&rig, valid_ms));
        rig.core.admit(SESSION, act, (), at(rig.now_ms)).unwrap();
        assert_eq!(rig.core.counts().late, late.max(1), "100 ms late, valid for {valid_ms} ms");
    }
    rig.run(100.0);
    assert_eq!(rig.rows().len(), 1);
}

#[test]
fn an_action_that_waited_longer_than_it_is_valid_is_dropped() {
    for hz in [20.0, 0.0] {
        let mut rig = Rig::new(hz);
        rig.row_ms = 79.0;
        rig.arrive([0.0], 0.0).unwrap();
        rig.ping(2.0);
        rig.run(1.0);
        let message = ActionMessage {
            session: SESSION,
            actions: [1.0].into(),
            sent_at: Some(at(1.0 - 72.0 + OFFSET_MS)),
            valid_for: Some(Duration::from_millis(80)),
            ..ActionMessage::default()
        };
        rig.core.admit(SESSION, Command::Act(message), (), at(1.0)).unwrap();
        assert_eq!(rig.core.counts().late, 0, "70 ms late");
        rig.run(500.0);
        assert_eq!(rig.rows().len(), 1, "{hz} Hz: applied 149 ms after it was sent");
        assert_eq!(rig.core.counts().late, 1);
    }
}

#[test]
fn actions_from_an_old_observation_are_refused_where_that_is_limited() {
    let limits = Limits { max_observation_age: Some(Duration::from_millis(300)), ..Limits::default() };
    let mut rig = Rig::with(20.0, limits);
    rig.run(1000.0);
    let mut refused = |observed_at: Option<f64>| {
        let observed_at = observed_at.map(at);
        let message = ActionMessage {
            session: SESSION,
            actions: [1.0].into(),
            observed_at,
            ..ActionMessage::default()
        };
        rig.core.admit(SESSION, Command::Act(message), (), at(1000.0)).map_err(|refusal| refusal.fault.code)
    };
    assert_eq!(refused(Some(600.0)), Err(Code::Stale));
    assert_eq!(refused(Some(800.0)), Ok(()));
    assert_eq!(refused(None), Ok(()), "a client that does not state it");
}

// ---- Chunks -------------------------------------------------------------------------------------------------

fn chunk(rows: usize, first: f32) -> ActionChunk {
    ActionChunk::new(1, (0..rows).map(|i| first + i as f32).collect()).unwrap()
}

#[test]
fn a_chunk_of_50_rows_is_applied_at_the_control_rate() {
    let mut rig = Rig::new(20.0);
    rig.row_ms = 7.0;
    rig.arrive(chunk(50, 0.0), 0.0).unwrap();
    rig.run(3100.0);
    let expected: Vec<_> = (0..50).map(|i| (f64::from(i) * 50.0, i as f32)).collect();
    assert_eq!(rig.rows(), expected);
    assert_eq!(rig.holds(), [(2450.0 + 50.0 + 500.0, HoldReason::CommandTimeout)]);
}

#[test]
fn a_newer_chunk_replaces_what_is_left_of_the_older_one() {
    let mut rig = Rig::new(20.0);
    rig.arrive(chunk(10, 0.0), 0.0).unwrap();
    rig.run(110.0);
    rig.arrive(chunk(2, 100.0), 110.0).unwrap();
    rig.run(120.0);
    rig.arrive([200.0], 110.5).unwrap();
    rig.run(300.0);
    assert_eq!(
        rig.rows(),
        [(0.0, 0.0), (50.0, 1.0), (100.0, 2.0), (125.0, 100.0), (160.0, 101.0), (210.0, 200.0)],
        "half a period after the row before; a single row that was sent together with a chunk follows it"
    );
    assert_eq!(rig.core.counts().superseded, 7);
}

#[test]
fn a_robot_that_is_slower_than_its_rate_skips_rows_and_never_catches_up() {
    let mut rig = Rig::new(20.0);
    rig.row_ms = 120.0;
    rig.arrive(chunk(10, 0.0), 0.0).unwrap();
    rig.run(1000.0);
    assert_eq!(rig.rows(), [(0.0, 0.0), (120.0, 2.0), (240.0, 4.0), (360.0, 7.0), (480.0, 9.0)]);
    assert_eq!(rig.core.counts().superseded, 5);
}

#[test]
fn rows_that_waited_for_a_busy_robot_are_late() {
    let mut rig = Rig::new(20.0);
    rig.row_ms = 3000.0;
    rig.arrive([0.0], 0.0).unwrap();
    rig.run(100.0);
    rig.arrive([1.0], 100.0).unwrap();
    rig.run(3500.0);
    assert_eq!(rig.rows(), [(0.0, 0.0)]);
    assert_eq!(rig.core.counts().late, 1);
}

#[test]
fn more_rows_than_the_queue_holds_are_refused() {
    let mut rig = Rig::new(20.0);
    let refused = (0..400).filter(|i| rig.arrive([*i as f32], 0.0).is_err()).count();
    assert_eq!(refused, 400 - 256);
    let fault = rig.arrive([0.0], 0.0).unwrap_err();
    assert_eq!((fault.code, fault.retryable), (Code::QueueFull, true));
    rig.arrive(chunk(4096, 0.0), 0.0).unwrap();
    assert_eq!(rig.arrive(chunk(4097, 0.0), 0.0).map_err(|fault| fault.code), Err(Code::Invalid));
}

// ---- The watchdog -------------------------------------------------------------------------------------------

#[test]
fn a_policy_that_hangs_makes_the_robot_hold_once() {
    let mut rig = Rig::new(50.0);
    rig.stream(50.0, 0.0, 1000.0, NO_STALL, true);
    // The client's own threads go on pinging.
    for second in 1..30 {
        rig.run(1000.0 * f64::from(second));
        rig.ping(2.0);
    }
    assert_eq!(rig.holds(), [(980.0 + 2.0 + 20.0 + 500.0, HoldReason::CommandTimeout)]);
    rig.arrive([1.0], rig.now_ms - 2.0).unwrap();
    rig.run(rig.now_ms + 1000.0);
    assert_eq!(rig.rows().len(), 51, "the next action goes on");
    assert_eq!(rig.holds().len(), 2);
    assert_eq!(rig.core.counts().refused, 0);
}

#[test]
fn a_policy_at_2_hz_is_held_between_its_actions_and_loses_none() {
    let mut rig = Rig::new(20.0);
    rig.stream(2.0, 0.0, 10_000.0, NO_STALL, true);
    rig.run(10_000.0);
    assert_eq!(rig.rows().len(), 20);
    assert_eq!(rig.holds(), [], "within 500 ms and a period");
    let mut slower = Rig::new(20.0);
    slower.stream(1.0, 0.0, 10_000.0, NO_STALL, true);
    slower.run(10_000.0);
    assert_eq!((slower.rows().len(), slower.holds().len()), (10, 10));
}

#[test]
fn a_hold_drops_what_is_left_of_a_chunk() {
    let mut rig = Rig::new(20.0);
    rig.row_ms = 700.0;
    rig.arrive(chunk(100, 0.0), 0.0).unwrap();
    rig.run(5000.0);
    assert_eq!(
        rig.rows(),
        [
            (0.0, 0.0),
            (700.0, 14.0),
            (1400.0, 28.0),
            (2100.0, 42.0),
            (2800.0, 56.0),
            (3500.0, 70.0),
            (4200.0, 84.0),
            (4900.0, 98.0)
        ]
    );
}

#[test]
fn a_hold_may_require_a_reset() {
    let limits = Limits { on_timeout: OnTimeout::RequireReset, ..Limits::default() };
    let mut rig = Rig::with(20.0, limits);
    rig.arrive([0.0], 0.0).unwrap();
    rig.run(1000.0);
    assert_eq!(rig.holds().len(), 1);
    assert_eq!(rig.arrive([1.0], 1000.0).map_err(|fault| fault.code), Err(Code::Holding));
    rig.reset();
    assert!(matches!(rig.core.poll(at(1000.0)), Work::Reset { .. }));
    rig.core.done(Err(Fault::new(Code::RobotFailed, "no power")), at(1000.0));
    assert_eq!(rig.arrive([1.0], 1000.0).map_err(|fault| fault.code), Err(Code::Holding), "it has failed");
    rig.reset();
    rig.run(1001.0);
    rig.arrive([2.0], 1001.0).unwrap();
    rig.run(1100.0);
    assert_eq!(rig.rows(), [(0.0, 0.0), (1001.0, 2.0)]);
}

#[test]
fn every_action_that_a_stop_drops_is_an_event() {
    let refused = |rig: &mut Rig| {
        let events = rig.core.take_events();
        let seq = |event: &ControlEvent| match event {
            ControlEvent::Refused { action, .. } => Some(action.seq),
            _ => None,
        };
        events.iter().filter_map(seq).collect::<Vec<_>>()
    };
    let stops: [fn(&mut Rig); 3] = [
        |rig| rig.reset(),
        |rig| assert!(rig.core.release(SESSION, "gone", at(1.0))),
        |rig| rig.core.note_silence(SESSION, at(1.0)),
    ];
    for stop in stops {
        let mut rig = Rig::new(20.0);
        rig.arrive(chunk(10, 0.0), 0.0).unwrap();
        rig.arrive([10.0], 0.0).unwrap();
        rig.run(1.0);
        stop(&mut rig);
        rig.run(10.0);
        assert_eq!(refused(&mut rig), [1, 2]);
        assert_eq!(rig.core.counts().refused, 2);
    }
}

#[test]
fn a_server_that_ends_while_the_robot_moves_makes_it_hold() {
    let mut rig = Rig::new(20.0);
    rig.arrive([0.0], 0.0).unwrap();
    rig.run(10.0);
    rig.core.stop();
    assert!(matches!(rig.core.poll(at(10.0)), Work::Hold(HoldReason::ShuttingDown)));
    rig.core.done(Ok(()), at(10.0));
    assert!(matches!(rig.core.poll(at(10.0)), Work::End));
}

#[test]
fn a_reset_of_10_s_is_not_a_hang() {
    let mut rig = Rig::new(20.0);
    rig.reset_ms = 10_000.0;
    rig.observe_ms = 800.0;
    rig.arrive(chunk(10, 0.0), 0.0).unwrap();
    rig.run(60.0);
    rig.reset();
    rig.run(9000.0);
    assert_eq!(rig.arrive([9.0], 9000.0).map_err(|fault| fault.code), Err(Code::Resetting));
    rig.run(10_500.0);
    assert_eq!(rig.arrive([9.0], 10_500.0).map_err(|fault| fault.code), Err(Code::Resetting), "no reply yet");
    rig.run(12_000.0);
    assert_eq!(
        rig.did,
        [(0.0, Did::Row(0.0)), (50.0, Did::Row(1.0)), (60.0, Did::Reset), (10_860.0, Did::Reply)]
    );
    assert_eq!(rig.core.episode(), 1);
}

#[test]
fn a_hold_overtakes_the_observation_of_a_reply() {
    let mut rig = Rig::new(20.0);
    rig.observe_ms = 60_000.0;
    rig.reset();
    rig.run(100.0);
    assert!(rig.core.release(SESSION, "gone", at(100.0)));
    rig.core.claim(8, "next", at(100.0)).unwrap();
    let reset = Command::Reset(ResetRequest::new(8));
    rig.core.admit(8, reset, (), at(100.0)).unwrap();
    rig.run(200.0);
    assert_eq!(rig.did, [(0.0, Did::Reset), (100.0, Did::Hold(HoldReason::ControllerLost))]);
    rig.observe_ms = 0.0;
    rig.run(60_100.0);
    assert_eq!(rig.did[2..], [(60_000.0, Did::Reply), (60_000.0, Did::Reset), (60_000.0, Did::Reply)]);
}

#[test]
fn the_loss_of_the_controller_is_a_hold_at_once() {
    let mut rig = Rig::new(20.0);
    rig.arrive(chunk(10, 0.0), 0.0).unwrap();
    rig.run(60.0);
    assert!(rig.core.release(SESSION, "gone", at(60.0)));
    assert!(!rig.core.release(SESSION, "gone", at(60.0)));
    assert_eq!(rig.arrive([5.0], 60.0).map_err(|fault| fault.code), Err(Code::NotController));
    rig.run(1000.0);
    assert_eq!(
        rig.did,
        [(0.0, Did::Row(0.0)), (50.0, Did::Row(1.0)), (60.0, Did::Hold(HoldReason::ControllerLost))]
    );
}

#[test]
fn silence_of_a_moving_robots_controller_is_a_hold() {
    let limits = Limits { command_timeout: None, ..Limits::default() };
    let mut rig = Rig::with(20.0, limits);
    rig.core.note_silence(SESSION, at(0.0));
    rig.run(10.0);
    rig.arrive([0.0], 10.0).unwrap();
    rig.run(2000.0);
    rig.core.note_silence(SESSION, at(2000.0));
    rig.core.note_silence(SESSION, at(2000.0));
    rig.run(3000.0);
    assert_eq!(rig.holds(), [(2000.0, HoldReason::Silence)]);
}

// ---- Steps --------------------------------------------------------------------------------------------------

#[test]
fn a_steps_rows_run_at_the_control_rate_and_its_reply_arms_the_watchdog() {
    let mut rig = Rig::new(20.0);
    rig.observe_ms = 900.0;
    rig.arrive([100.0], 0.0).unwrap();
    rig.step(3);
    rig.run(5000.0);
    assert_eq!(rig.rows(), [(0.0, 100.0), (25.0, 0.0), (75.0, 1.0), (125.0, 2.0)]);
    assert_eq!(
        rig.did[5..],
        [(1025.0, Did::Reply), (1525.0, Did::Hold(HoldReason::CommandTimeout))],
        "not while the policy waits for the reply"
    );
}

#[test]
fn a_reset_or_step_that_fails_leaves_no_robot_moving_unwatched() {
    for is_reset in [true, false] {
        let mut rig = Rig::new(20.0);
        rig.arrive([0.0], 0.0).unwrap();
        rig.run(10.0);
        if is_reset {
            rig.reset()
        } else {
            rig.step(1)
        }
        match rig.core.poll(at(10.0)) {
            Work::Reset { .. } | Work::Step { .. } => {}
            other => panic!("{other:?}"),
        }
        rig.core.done(Err(Fault::new(Code::RobotFailed, "no power")), at(10.0));
        rig.run(5000.0);
        assert_eq!(rig.holds(), [(510.0, HoldReason::CommandTimeout)], "reset: {is_reset}");
    }
}

#[test]
fn a_steps_rows_do_not_catch_up_after_a_slow_one() {
    let mut rig = Rig::new(20.0);
    rig.row_ms = 1000.0;
    rig.step(5);
    rig.run(1.0);
    rig.row_ms = 0.0;
    rig.run(2000.0);
    let at: Vec<_> = rig.rows().iter().map(|row| row.0).collect();
    assert_eq!(at, [0.0, 1000.0, 1050.0, 1100.0, 1150.0]);
}

#[test]
fn silence_ends_a_step() {
    let mut rig = Rig::new(20.0);
    rig.step(200);
    rig.run(2000.0);
    rig.core.note_silence(SESSION, at(2000.0));
    rig.step(3);
    rig.run(5000.0);
    assert_eq!(rig.rows().len(), 41);
    assert_eq!(
        rig.did[42..],
        [
            (2000.0, Did::Hold(HoldReason::Silence)),
            (2000.0, Did::Refuse(Code::Stale)),
            (2000.0, Did::Refuse(Code::Stale))
        ]
    );
    rig.step(3);
    rig.run(10_000.0);
    assert_eq!(rig.rows().len(), 44, "the next one goes on");
}

#[test]
fn a_reset_overtakes_a_steps_rows() {
    let mut rig = Rig::new(20.0);
    rig.step(100);
    rig.run(60.0);
    rig.reset();
    rig.run(200.0);
    assert_eq!(rig.rows().len(), 2);
    assert_eq!(rig.did[3..], [(60.0, Did::Refuse(Code::Stale)), (60.0, Did::Reset), (60.0, Did::Reply)]);
}

#[test]
fn a_step_of_a_lock_step_robot_never_makes_it_hold() {
    let mut rig = Rig::of(20.0, Limits::default(), Execution::Rows, true);
    for policy_thinks_until in [12_000.0, 24_000.0] {
        rig.step(3);
        rig.run(policy_thinks_until);
    }
    assert_eq!((rig.rows().len(), rig.holds()), (6, vec![]));
}

// ---- Robots that execute chunks themselves ------------------------------------------------------------------

#[test]
fn a_chunk_that_the_robot_executes_is_watched_until_its_end_and_a_single_row_follows_it() {
    let mut rig = Rig::of(20.0, Limits::default(), Execution::Chunks, false);
    rig.arrive(chunk(20, 0.0), 0.0).unwrap();
    rig.run(5000.0);
    assert_eq!(rig.rows(), [(0.0, 0.0)], "whole");
    assert_eq!(rig.holds(), [(20.0 * 50.0 + 500.0, HoldReason::CommandTimeout)]);
    assert_eq!(rig.core.counts().applied, 20);

    let mut rig = Rig::of(20.0, Limits::default(), Execution::Chunks, false);
    rig.arrive(chunk(20, 0.0), 0.0).unwrap();
    rig.run(300.0);
    rig.arrive([100.0], 300.0).unwrap();
    rig.run(5000.0);
    assert_eq!(rig.rows(), [(0.0, 0.0), (1000.0, 100.0)]);
    assert_eq!(rig.holds(), [(1550.0, HoldReason::CommandTimeout)]);
}

#[test]
fn a_chunk_that_a_newer_one_replaces_counts_as_superseded() {
    let mut rig = Rig::of(20.0, Limits::default(), Execution::Chunks, false);
    rig.row_ms = 1000.0;
    rig.arrive(chunk(20, 0.0), 0.0).unwrap();
    rig.run(100.0);
    rig.arrive(chunk(10, 100.0), 100.0).unwrap();
    rig.run(5000.0);
    assert_eq!(rig.rows(), [(0.0, 0.0), (1025.0, 100.0)], "a robot that does not look whether it is over");
    let counts = rig.core.counts();
    assert_eq!((counts.superseded, counts.applied, counts.refused), (20, 10, 0));
}

// ---- The stopper --------------------------------------------------------------------------------------------

#[test]
fn a_robot_that_blocks_while_a_hold_is_due_is_stopped() {
    let mut rig = Rig::new(20.0);
    rig.row_ms = 10_000.0;
    assert_eq!(rig.core.stop_due(at(0.0)), StopDue::Never);
    rig.arrive([0.0], 0.0).unwrap();
    rig.run(100.0);
    assert_eq!(rig.core.stop_due(at(100.0)), StopDue::At(at(550.0)));
    assert_eq!(rig.core.stop_due(at(550.0)), StopDue::Now);
    rig.core.begin_stop(true, at(550.0));
    assert_eq!(rig.core.stop_due(at(560.0)), StopDue::Never, "once");
    // Whatever has come meanwhile, the robot holds, and nothing begins while the stopper is busy.
    rig.row_ms = 0.0;
    rig.arrive([1.0], 0.0).unwrap();
    rig.core.done(Ok(()), at(570.0));
    rig.busy_until_ms = None;
    rig.now_ms = 570.0;
    rig.run(600.0);
    assert_eq!(rig.holds(), [(570.0, HoldReason::CommandTimeout)]);
    rig.arrive([2.0], 600.0).unwrap();
    assert!(matches!(rig.core.poll(at(600.0)), Work::Idle));
    rig.core.end_stop();
    assert_eq!(rig.core.counts().applied, 1, "what it was stopped in was applied");
    let was_watching = rig.core.is_watching(at(600.0));
    rig.row_ms = 10_000.0;
    rig.run(600.0);
    assert!(!was_watching && rig.core.is_watching(at(600.0)), "the supervisor is woken");
    assert_eq!(rig.core.stop_due(at(1150.0)), StopDue::Now, "the next call is stopped, too");

    let mut rig = Rig::new(20.0);
    rig.reset_ms = 60_000.0;
    rig.reset();
    rig.run(50_000.0);
    assert_eq!(rig.core.stop_due(at(50_000.0)), StopDue::Never, "a reset may take as long as it takes");
    rig.core.release(SESSION, "gone", at(50_000.0));
    assert_eq!(rig.core.stop_due(at(50_000.0)), StopDue::Now);
}
