//! Known functions, with the numbers of evaluations that pycma 4.5.0 takes beside ours.
#![allow(clippy::unwrap_used)]
use std::collections::HashMap;

use super::*;

fn sphere(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum()
}

/// Axes whose curvatures are up to 10⁶ apart.
fn ellipsoid(x: &[f64]) -> f64 {
    let last = (x.len() - 1) as f64;
    x.iter().enumerate().map(|(i, x)| 10f64.powf(6.0 * i as f64 / last) * x * x).sum()
}

/// The same along other axes: each coordinate pair turned by 45°.
fn turned_ellipsoid(x: &[f64]) -> f64 {
    let n = x.len();
    let turned = (0..n).map(|i| {
        let (a, b) = (x[i / 2], x[n / 2 + i / 2]);
        if i.is_multiple_of(2) { (a + b) * 0.5f64.sqrt() } else { (a - b) * 0.5f64.sqrt() }
    });
    ellipsoid(&turned.collect::<Vec<_>>())
}

/// A bent valley with its floor's lowest point at 1.
fn rosenbrock(x: &[f64]) -> f64 {
    x.windows(2).map(|w| 100.0 * (w[1] - w[0] * w[0]).powi(2) + (1.0 - w[0]).powi(2)).sum()
}

fn search(start: f64, dim: usize, seed: u64) -> CmaEs {
    CmaEs::new(CmaEsConfig { mean: vec![start; dim], sigma: 0.5, population: None, seed, site: 0 }).unwrap()
}

fn generation(search: &mut CmaEs, f: &dyn Fn(&[f64]) -> f64) -> f64 {
    let points = search.ask().unwrap();
    let values: Vec<f64> = points.iter().map(|x| f(x)).collect();
    search.tell(&points, &values).unwrap();
    values.into_iter().fold(f64::INFINITY, f64::min)
}

/// Evaluations until a value below 10⁻⁹ was seen, the middle of five runs.
fn evaluations(start: f64, f: &dyn Fn(&[f64]) -> f64) -> usize {
    let one = |seed| {
        let mut search = search(start, 10, seed);
        while generation(&mut search, f) > 1e-9 {
            assert!(search.generation() < 4000, "no convergence with seed {seed}");
        }
        search.generation() as usize * search.population()
    };
    let mut all: Vec<usize> = (1..=5).map(one).collect();
    all.sort();
    all[2]
}

/// pycma's medians of 15 runs (`cma.fmin(f, [x0] * 10, 0.5, ftarget=1e-9)`): 1481, 4081 and 5306.
#[test]
fn known_functions_take_as_long_as_with_pycma() {
    for (name, start, f, pycma) in [
        ("sphere", 1.0, &sphere as &dyn Fn(&[f64]) -> f64, 1481.0),
        ("ellipsoid", 1.0, &ellipsoid, 4081.0),
        ("turned ellipsoid", 1.0, &turned_ellipsoid, 4081.0),
        // Half of the way: from 0 one run in fifteen ends in the other valley of the function, pycma's too.
        ("rosenbrock", 0.5, &rosenbrock, 5306.0),
    ] {
        let taken = evaluations(start, f) as f64;
        assert!((0.7..1.3).contains(&(taken / pycma)), "{name}: {taken} evaluations, pycma {pycma}");
    }
}

#[test]
fn the_defaults_are_the_tutorials() {
    // n = 10: λ = 4 + ⌊3 ln 10⌋ = 10, and Table 1 by hand.
    let s = search(0.0, 10, 0).strategy;
    assert_eq!((s.weights.len(), s.parents), (10, 5));
    assert!((s.weights.iter().take(5).sum::<f64>() - 1.0).abs() < 1e-12);
    assert!((s.mu_eff - 3.167_3).abs() < 1e-3, "{}", s.mu_eff);
    assert!(
        (s.c_sigma - 5.167_3 / 18.167_3).abs() < 1e-4 && (s.c_1 - 2.0 / (11.3f64.powi(2) + s.mu_eff)).abs() < 1e-12
    );
    assert!(s.c_1 + s.c_mu < 1.0 && s.weights.iter().skip(5).all(|w| *w <= 0.0));
    assert!((s.chi - 3.0847).abs() < 1e-3, "{}", s.chi);
}

#[test]
fn only_the_order_of_values_counts() {
    let (mut plain, mut bent) = (search(1.0, 7, 3), search(1.0, 7, 3));
    for _ in 0..60 {
        generation(&mut plain, &ellipsoid);
        generation(&mut bent, &|x| (ellipsoid(x) * 1e-3).atan() * 7.0 - 2.0);
    }
    assert_eq!(plain.mean(), bent.mean());
    // What is not a number is worse than anything that is.
    let points = plain.ask().unwrap();
    let mut nan: Vec<f64> = points.iter().map(|x| sphere(x)).collect();
    let worst = (0..nan.len()).max_by(|&a, &b| nan[a].total_cmp(&nan[b])).unwrap();
    let values = nan.clone();
    nan[worst] = f64::NAN;
    bent.tell(&points, &nan).unwrap();
    plain.tell(&points, &values).unwrap();
    assert_eq!(plain.mean(), bent.mean());
}

#[test]
fn a_search_goes_on_bit_for_bit_and_damaged_states_are_refused() {
    let mut whole = search(1.0, 6, 9);
    let cuts: Vec<HashMap<String, candle_core::Tensor>> = (0..40)
        .map(|_| {
            generation(&mut whole, &rosenbrock);
            whole.state("a.").unwrap().into_iter().collect()
        })
        .collect();
    for (done, state) in cuts.iter().enumerate().step_by(7) {
        let mut other = search(5.0, 6, 9);
        other.load_state(state, "a.").unwrap();
        (done + 1..40).for_each(|_| {
            generation(&mut other, &rosenbrock);
        });
        assert_eq!(other.mean(), whole.mean());
        assert_eq!(other.sigma().to_bits(), whole.sigma().to_bits());
    }
    let good = &cuts[3];
    let mut fresh = search(1.0, 6, 9);
    assert!(fresh.load_state(good, "b.").unwrap_err().to_string().contains("b.scalars"));
    for (name, value) in [("a.mean", f64::NAN), ("a.scalars", -1.0), ("a.roots", 0.0)] {
        let mut bad = good.clone();
        let broken = bad[name].zeros_like().unwrap().affine(1.0, value).unwrap();
        bad.insert(name.into(), broken);
        assert!(fresh.load_state(&bad, "a.").unwrap_err().to_string().contains(name), "{name}");
    }
    assert!(search(1.0, 7, 9).load_state(good, "a.").is_err());
    assert_eq!(fresh.generation(), 0);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let make = |mean: Vec<f64>, sigma, population| {
        CmaEs::new(CmaEsConfig { mean, sigma, population, seed: 0, site: 0 }).unwrap_err().to_string()
    };
    assert!(make(vec![], 1.0, None).contains("coordinates"));
    assert!(make(vec![f64::NAN], 1.0, None).contains("finite"));
    assert!(make(vec![0.0], 0.0, None).contains("step size"));
    assert!(make(vec![0.0], 1.0, Some(3)).contains("3 points"));
    let mut one = search(1.0, 1, 0);
    assert!(one.tell(&[vec![0.0]], &[0.0]).is_err());
    // One coordinate is enough to search.
    while generation(&mut one, &sphere) > 1e-9 {
        assert!(one.generation() < 500);
    }
}
