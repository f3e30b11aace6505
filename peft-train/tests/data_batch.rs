//! Batches and samplers: nothing lost, nothing doubled, the same order again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use peft_train::data::{
    Batch, DataSpec, Dataset, EncodeOptions, Example, Format, HeadRow, Location, MixturePart, Predictor, Sampler,
    SamplerOptions, SamplerState, Truncation,
};
use proptest::prelude::*;

fn dataset(lengths: &[usize]) -> Dataset {
    let file: std::sync::Arc<std::path::Path> = std::path::Path::new("t.jsonl").into();
    let examples: Vec<Example> = lengths
        .iter()
        .enumerate()
        .map(|(row, &n)| Example {
            input_ids: (0..n as u32).map(|t| row as u32 * 1000 + t).collect(),
            labels: (0..n as i32).map(|t| if t % 3 == 1 { t } else { -100 }).collect(),
            types: Vec::new(),
            source_tokens: 0,
            task: None,
            predictor: Predictor::Previous,
            head: HeadRow::default(),
            source: Location::line(&file, row as u64 + 1),
            truncation: Truncation::default(),
        })
        .collect();
    Dataset::from_examples(&examples)
}

fn options(batch_size: usize, shuffle: bool) -> SamplerOptions {
    SamplerOptions { batch_size, shuffle, ..Default::default() }
}

fn epoch(sampler: &mut Sampler) -> Vec<Vec<usize>> {
    let e = sampler.state().epoch;
    let mut batches = Vec::new();
    while sampler.state().epoch == e {
        batches.push(sampler.next_batch());
    }
    batches
}

#[test]
fn a_batch_is_packed_and_shifted_within_sequences() {
    let d = dataset(&[3, 1, 5]);
    let b = Batch::new(&d, &[2, 0, 1]);
    assert_eq!(b.input_ids, [2000, 2001, 2002, 2003, 2004, 0, 1, 2, 1000]);
    assert_eq!(b.position_ids, [0, 1, 2, 3, 4, 0, 1, 2, 0]);
    assert_eq!(b.bounds, [0, 5, 8, 9]);
    assert_eq!(b.labels, [-100, 1, -100, -100, 4, -100, 1, -100, -100]);
    assert_eq!((b.sequences(), b.tokens()), (3, 9));
    let t = b.targets();
    assert_eq!(t.positions, [0, 3, 5]);
    assert_eq!(t.ids, [1, 4, 1]);
    assert_eq!(Batch::new(&d, &[]).bounds, [0]);

    // A counted label at the start of a sequence has no predecessor, even inside a batch.
    let file = std::path::Path::new("t").into();
    let example = Example {
        input_ids: vec![7, 8],
        labels: vec![7, 8],
        types: Vec::new(),
        source_tokens: 0,
        task: None,
        predictor: Predictor::Previous,
        head: HeadRow::default(),
        source: Location::line(&file, 1),
        truncation: Truncation::default(),
    };
    let t = Batch::new(&Dataset::from_examples([&example, &example]), &[0, 1]).targets();
    assert_eq!((t.positions, t.ids), (vec![0, 2], vec![8, 8]));
}

#[test]
fn without_shuffle_rows_come_in_file_order() {
    let mut s = Sampler::new(&dataset(&[2; 7]), options(3, false)).unwrap();
    for _ in 0..2 {
        assert_eq!(epoch(&mut s), [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }
    assert_eq!(s.batches_in_epoch(9), 3);
}

#[test]
fn the_shuffled_order_is_fixed_for_all_time() {
    let mut s = Sampler::new(&dataset(&[2; 8]), options(8, true)).unwrap();
    // A change here breaks the resume of every run that is under way.
    assert_eq!(s.next_batch(), FIRST_EPOCH);
    assert_eq!(s.next_batch(), SECOND_EPOCH);
}
const FIRST_EPOCH: [usize; 8] = [1, 2, 3, 7, 6, 4, 5, 0];
const SECOND_EPOCH: [usize; 8] = [6, 2, 0, 4, 5, 7, 3, 1];

#[test]
fn packing_fills_a_token_budget() {
    let d = dataset(&[3, 4, 5, 2, 10, 1, 1]);
    let mut o = options(1, false);
    o.packing = Some(10);
    let mut s = Sampler::new(&d, o.clone()).unwrap();
    assert_eq!(epoch(&mut s), [vec![0, 1], vec![2, 3], vec![4], vec![5, 6]]);
    o.packing = Some(9);
    let e = Sampler::new(&d, o.clone()).unwrap_err().to_string();
    assert!(e.contains("t.jsonl:5: the row has 10 tokens, a packed batch 9"), "{e}");
    o.group_by_length = true;
    assert!(Sampler::new(&d, o).unwrap_err().to_string().contains("choose one"));
    assert!(Sampler::new(&d, options(0, true)).unwrap_err().to_string().contains("batch_size"));
    assert!(Sampler::new(&dataset(&[]), options(1, true)).unwrap_err().to_string().contains("no rows"));
}

#[test]
fn batches_by_length_hold_like_rows() {
    let lengths: Vec<usize> = (0..400).map(|i| 2 + (i * 37) % 200).collect();
    let d = dataset(&lengths);
    let spread = |group_by_length| {
        let o = SamplerOptions { group_by_length, ..options(8, true) };
        epoch(&mut Sampler::new(&d, o).unwrap())
            .iter()
            .map(|b| {
                let l = b.iter().map(|&r| lengths[r]);
                l.clone().max().unwrap() - l.min().unwrap()
            })
            .sum::<usize>()
    };
    assert!(spread(true) * 10 < spread(false), "{} {}", spread(true), spread(false));
    let o = SamplerOptions { group_by_length: true, ..options(8, false) };
    let first = Sampler::new(&d, o).unwrap().next_batch();
    assert!(first.iter().all(|&r| lengths[r] >= 195), "longest first");
}

#[test]
fn seek_refuses_what_is_not_there() {
    let mut s = Sampler::new(&dataset(&[2; 7]), options(3, true)).unwrap();
    let before = s.state();
    let e = s.seek(SamplerState { epoch: 4, batch: 3 }).unwrap_err().to_string();
    assert!(e.contains("batch 3 of epoch 4") && e.contains("has 3 batches"), "{e}");
    assert_eq!(s.state(), before);
}

#[test]
fn mixtures_draw_by_weight_and_visit_all_rows_equally() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, rows: usize| {
        let path = folder.path().join(name);
        std::fs::write(&path, "{\"input_ids\": [1, 2]}\n".repeat(rows)).unwrap();
        path
    };
    let parts = vec![
        MixturePart { path: file("big.jsonl", 90), weight: Some(1.0) },
        MixturePart { path: file("small.jsonl", 10), weight: Some(1.0) },
    ];
    let (d, _) = Dataset::load(&DataSpec::Mixture(parts), None, None, &EncodeOptions::new(Format::Tokens)).unwrap();
    for shuffle in [true, false] {
        let mut s = Sampler::new(&d, options(7, shuffle)).unwrap();
        let mut seen: BTreeMap<usize, usize> = BTreeMap::new();
        for _ in 0..9 {
            let rows: Vec<usize> = epoch(&mut s).concat();
            assert_eq!(rows.len(), 100);
            assert_eq!(rows.iter().filter(|&&r| r < 90).count(), 50);
            for r in rows {
                *seen.entry(r).or_default() += 1;
            }
        }
        // 450 draws of 90 rows and 450 of 10.
        assert!((0..90).all(|r| seen[&r] == 5), "{seen:?}");
        assert!((90..100).all(|r| seen[&r] == 45), "{seen:?}");
    }
}

fn any_options() -> impl Strategy<Value = SamplerOptions> {
    (1usize..9, any::<bool>(), any::<u64>(), 0u8..3).prop_map(|(batch_size, shuffle, seed, kind)| SamplerOptions {
        batch_size,
        shuffle,
        seed,
        group_by_length: kind == 1,
        packing: (kind == 2).then_some(batch_size * 20),
    })
}

proptest! {
    /// Every row once an epoch, every token and label in its batch, batches no larger than asked.
    #[test]
    fn nothing_is_lost(lengths in prop::collection::vec(1usize..21, 1..120), options in any_options()) {
        let d = dataset(&lengths);
        let mut s = Sampler::new(&d, options.clone()).unwrap();
        for e in 0..3u64 {
            let expected = s.batches_in_epoch(e);
            let batches = epoch(&mut s);
            prop_assert_eq!(batches.len(), expected);
            let mut rows = batches.concat();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
            let mut tokens = 0;
            let mut counted = 0;
            for rows in &batches {
                prop_assert!(!rows.is_empty());
                let b = Batch::new(&d, rows);
                match options.packing {
                    Some(budget) => prop_assert!(b.tokens() <= budget),
                    None => prop_assert!(rows.len() <= options.batch_size),
                }
                prop_assert_eq!(b.bounds.len(), rows.len() + 1);
                for (i, &row) in rows.iter().enumerate() {
                    prop_assert_eq!(&b.input_ids[b.bounds[i]..b.bounds[i + 1]], d.input_ids(row));
                    prop_assert_eq!(&b.labels[b.bounds[i]..b.bounds[i + 1]], d.labels(row));
                }
                let t = b.targets();
                for (&p, &id) in t.positions.iter().zip(&t.ids) {
                    prop_assert_eq!(b.labels[p as usize + 1], id as i32);
                    prop_assert!(!b.bounds.contains(&(p as usize + 1)));
                }
                tokens += b.tokens();
                counted += t.ids.len();
            }
            prop_assert_eq!(tokens, d.stats().tokens);
            prop_assert_eq!(counted, d.stats().counted_tokens);
        }
    }

    /// A fresh sampler that seeks a state goes on as the old one did.
    #[test]
    fn resume_is_exact(lengths in prop::collection::vec(1usize..21, 1..60), options in any_options(), steps in 0usize..80) {
        let d = dataset(&lengths);
        let mut a = Sampler::new(&d, options.clone()).unwrap();
        for _ in 0..steps {
            a.next_batch();
        }
        let mut b = Sampler::new(&d, options).unwrap();
        b.seek(a.state()).unwrap();
        for _ in 0..30 {
            prop_assert_eq!(a.state(), b.state());
            prop_assert_eq!(a.next_batch(), b.next_batch());
        }
    }
}
