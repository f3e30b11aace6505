//! The update by hand and against the true gradient, the simplex against its definition, drawing against its frequencies.
#![allow(clippy::unwrap_used)]
use super::*;

fn bdpl(length: usize, words: usize, samples: usize) -> Bdpl {
    let candidates = (0..words).map(|i| format!("w{i}")).collect();
    Bdpl::new(BdplConfig { length, samples, max_grad_norm: 0.0, seed: 3 }, candidates).unwrap()
}

#[test]
fn an_update_is_the_papers() {
    // Two places of three words; p = 1/3 everywhere, so that a slope is 3 times its weight.
    let mut b = bdpl(2, 3, 2);
    let norm = b.update(&[vec![0, 2], vec![1, 2]], &[1.0, 3.0], 0.01).unwrap();
    // Mean 2, weights −1 and +1. Place 0: 3·(−1, +1, +1) and 3·(−1, +1, −1) add up to (−6, 6, 0). Place 1: nothing, as both agree.
    assert!((norm - 72f64.sqrt()).abs() < 1e-5, "{norm}");
    let want = [1.0 / 3.0 + 0.06, 1.0 / 3.0 - 0.06, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0];
    assert!(b.probabilities.iter().zip(want).all(|(p, w)| (f64::from(*p) - w).abs() < 1e-6), "{:?}", b.probabilities);
    assert_eq!(b.likeliest(), [0, 0]);
    assert_eq!(b.text(&[1, 2]), "w1 w2\n");

    // A norm that is too large is made the largest; a step that leaves the simplex comes back to it.
    let mut clipped = bdpl(1, 2, 2);
    clipped.config.max_grad_norm = 1.0;
    clipped.update(&[vec![0], vec![1]], &[0.0, 100.0], 0.1).unwrap();
    assert!((f64::from(clipped.probabilities[0]) - (0.5 + 0.1 * 0.5f64.sqrt())).abs() < 1e-6);
    clipped.update(&[vec![0], vec![1]], &[0.0, 1.0], 10.0).unwrap();
    assert_eq!(clipped.probabilities, [1.0, 0.0]);
    assert!(clipped.draw(0).unwrap().iter().all(|prompt| prompt == &[0]));
    assert_eq!(clipped.entropy(), 0.0);
}

/// Over all draws, the estimate is twice the derivative of the mean loss (on the simplex): the paper's derivative of `log P` counts
/// the chosen word's probability and the others', which are bound to it.
#[test]
fn the_estimate_points_along_the_gradient_of_the_mean_loss() {
    let losses = [[0.3, 0.9, 0.1], [0.5, 0.2, 0.8], [0.4, 0.6, 0.7]];
    let mut b = bdpl(2, 3, 20_000);
    let p = [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]];
    b.probabilities = p.iter().flatten().map(|p| *p as f32).collect();
    let drawn = b.draw(1).unwrap();
    let values: Vec<f64> = drawn.iter().map(|d| losses[d[0]][d[1]]).collect();
    let rate = 1e-3;
    b.update(&drawn, &values, rate).unwrap();
    // d/dp₀ⱼ of Σ p₀ᵢ p₁ⱼ L, less its mean over the place's words: what stays of it on the simplex.
    let mut slopes: Vec<f64> = (0..3).map(|i| (0..3).map(|j| p[1][j] * losses[i][j]).sum()).collect();
    let mean = slopes.iter().sum::<f64>() / 3.0;
    slopes.iter_mut().for_each(|s| *s -= mean);
    for (i, slope) in slopes.iter().enumerate() {
        let moved = (f64::from(b.probabilities[i]) - p[0][i]) / -rate;
        assert!((moved - 2.0 * slope).abs() < 0.03, "word {i}: {moved} {slope}");
    }
}

#[test]
fn the_simplex_is_reached_by_the_shortest_way() {
    for point in [vec![0.2, 0.3, 0.5], vec![3.0, 0.1, -2.0], vec![-1.0, -1.0, -1.0], vec![0.6, 0.7, -0.1], vec![5.0]] {
        let onto = onto_simplex(&point);
        assert!((onto.iter().sum::<f64>() - 1.0).abs() < 1e-12 && onto.iter().all(|x| *x >= 0.0), "{onto:?}");
        // Where a coordinate is positive, all are shifted by the same; where it is 0, by less (Karush, Kuhn, Tucker).
        let shift = point.iter().zip(&onto).filter(|(_, o)| **o > 0.0).map(|(p, o)| p - o).next().unwrap();
        for (p, o) in point.iter().zip(&onto) {
            assert!(if *o > 0.0 { (p - o - shift).abs() < 1e-12 } else { p - shift <= 1e-12 }, "{point:?} {onto:?}");
        }
    }
}

#[test]
fn draws_have_their_frequencies_and_repeat() {
    let mut b = bdpl(1, 4, 20_000);
    b.probabilities = vec![0.1, 0.0, 0.6, 0.3];
    let draws = b.draw(7).unwrap();
    assert_eq!(draws, b.draw(7).unwrap());
    assert_ne!(draws, b.draw(8).unwrap());
    for (word, p) in [(0, 0.1), (1, 0.0), (2, 0.6), (3, 0.3)] {
        let share = draws.iter().filter(|d| d[0] == word).count() as f64 / 20_000.0;
        assert!((share - p).abs() < 0.012, "{word}: {share}");
    }
    assert_eq!((drawn(&[0.5, 0.5], 0.999_999_9), drawn(&[1.0, 0.0], 0.999_999_9)), (1, 0));
}

#[test]
fn states_return_and_nonsense_is_refused() {
    let mut b = bdpl(2, 3, 2);
    b.update(&[vec![0, 2], vec![1, 2]], &[1.0, 3.0], 0.01).unwrap();
    let state: HashMap<_, _> = b.state().unwrap().into_iter().collect();
    let mut other = bdpl(2, 3, 2);
    other.load_state(&state).unwrap();
    assert_eq!(other.probabilities, b.probabilities);
    assert!(bdpl(2, 4, 2).load_state(&state).unwrap_err().to_string().contains("probabilities"));
    let negative = HashMap::from([(PROBABILITIES.to_owned(), state[PROBABILITIES].neg().unwrap())]);
    assert!(other.load_state(&negative).unwrap_err().to_string().contains("add up"));

    assert!(other.update(&[vec![0, 2]], &[1.0], 0.1).is_err());
    assert!(other.update(&[vec![0, 3], vec![0, 0]], &[1.0, 1.0], 0.1).is_err());
    assert!(other.update(&[vec![0, 2], vec![1, 2]], &[1.0, f64::NAN], 0.1).unwrap().is_nan());
    assert_eq!(other.probabilities, b.probabilities);
    let make = |length, samples, words: usize| {
        let config = BdplConfig { length, samples, max_grad_norm: 0.0, seed: 0 };
        Bdpl::new(config, vec!["a".into(); words]).unwrap_err().to_string()
    };
    assert!(make(0, 2, 2).contains("bdpl_length") && make(1, 1, 2).contains("bdpl_samples"));
    assert!(make(1, 2, 1).contains("bdpl_vocabulary") && make(1 << 23, 2, 3).contains("bdpl_length"));
}
