//! CMA-ES, the evolution strategy with covariance matrix adaptation (Hansen 2016, "The CMA Evolution Strategy: A Tutorial",
//! arXiv:1604.00772), with its defaults and its negative weights (active CMA-ES).
//!
//! A generation draws `λ` points from `N(m, σ²C)`, ranks them by a function that need not be smooth, and moves mean, step size
//! and covariance towards the better half. All arithmetic is in `f64` on one thread and all draws come from the counter
//! generator, so that a search is a function of its start and of the values that it was told.

mod state;

use nalgebra::{DMatrix, DVector, SymmetricEigen};
use peft_core::kernels::Stream;
use peft_core::{Error, Result};

/// Keeps the numbers apart from those of initialisation, dropout and MeZO, which share the run's seed.
const PURPOSE: u64 = 0x434d_4145 << 32;
/// Eigenvalues below the largest times this are taken for it: rounding must not make a variance negative.
const LEAST_EIGENVALUE: f64 = 1e-14;

/// How a search begins.
#[derive(Debug, Clone, PartialEq)]
pub struct CmaEsConfig {
    /// The first mean; its length is the dimension.
    pub mean: Vec<f64>,
    /// The first standard deviation of every coordinate.
    pub sigma: f64,
    /// Points a generation; `None` is `4 + ⌊3 ln n⌋`.
    pub population: Option<usize>,
    /// Seed of the draws.
    pub seed: u64,
    /// Keeps searches with one seed apart.
    pub site: u32,
}

/// The tutorial's Table 1.
#[derive(Debug, Clone)]
struct Strategy {
    /// Of the points from the best to the worst: positive ones add up to 1, the others pull away.
    weights: Vec<f64>,
    /// Points with a positive weight.
    parents: usize,
    mu_eff: f64,
    c_sigma: f64,
    d_sigma: f64,
    c_c: f64,
    c_1: f64,
    c_mu: f64,
    /// Expected length of a standard normal vector.
    chi: f64,
}

impl Strategy {
    fn new(dim: usize, population: usize) -> Self {
        let (n, lambda) = (dim as f64, population as f64);
        let raw: Vec<f64> = (1..=population).map(|i| ((lambda + 1.0) / 2.0).ln() - (i as f64).ln()).collect();
        let parents = population / 2;
        let effective = |w: &[f64]| w.iter().sum::<f64>().powi(2) / w.iter().map(|w| w * w).sum::<f64>();
        let (better, worse) = raw.split_at(parents);
        let (mu_eff, mu_eff_minus) = (effective(better), effective(worse));
        let c_1 = 2.0 / ((n + 1.3).powi(2) + mu_eff);
        let c_mu = (1.0 - c_1).min(2.0 * (0.25 + mu_eff + 1.0 / mu_eff - 2.0) / ((n + 2.0).powi(2) + mu_eff));
        let most = (1.0 + c_1 / c_mu)
            .min(1.0 + 2.0 * mu_eff_minus / (mu_eff + 2.0))
            .min((1.0 - c_1 - c_mu) / (n * c_mu))
            .max(0.0);
        let positive: f64 = raw.iter().filter(|w| **w > 0.0).sum();
        let negative: f64 = -raw.iter().filter(|w| **w < 0.0).sum::<f64>();
        let weights = raw.iter().map(|&w| if w >= 0.0 { w / positive } else { w * most / negative }).collect();
        let c_sigma = (mu_eff + 2.0) / (n + mu_eff + 5.0);
        Self {
            weights,
            parents,
            mu_eff,
            c_sigma,
            d_sigma: 1.0 + 2.0 * (((mu_eff - 1.0) / (n + 1.0)).sqrt() - 1.0).max(0.0) + c_sigma,
            c_c: (4.0 + mu_eff / n) / (n + 4.0 + 2.0 * mu_eff / n),
            c_1,
            c_mu,
            chi: n.sqrt() * (1.0 - 1.0 / (4.0 * n) + 1.0 / (21.0 * n * n)),
        }
    }

    /// Generations for which one decomposition of the covariance is good enough (the tutorial's B.2).
    fn lazy_generations(&self, dim: usize) -> u64 {
        (1.0 / (10.0 * dim as f64 * (self.c_1 + self.c_mu))).floor() as u64
    }
}

/// A search under way.
#[derive(Debug, Clone)]
pub struct CmaEs {
    strategy: Strategy,
    stream: Stream,
    generation: u64,
    mean: DVector<f64>,
    sigma: f64,
    path_sigma: DVector<f64>,
    path_c: DVector<f64>,
    covariance: DMatrix<f64>,
    /// Eigenvectors of the covariance, and the roots of its eigenvalues, as of generation `decomposed`.
    vectors: DMatrix<f64>,
    roots: DVector<f64>,
    decomposed: u64,
}

impl CmaEs {
    /// A search before its first generation.
    ///
    /// # Errors
    /// No coordinates, a mean that is not finite, a step size that is not positive, fewer than four points.
    pub fn new(config: CmaEsConfig) -> Result<Self> {
        let CmaEsConfig { mean, sigma, population, seed, site } = config;
        let n = mean.len();
        let population = population.unwrap_or_else(|| default_population(n));
        if n == 0 || mean.iter().any(|x| !x.is_finite()) {
            return Err(Error::msg("cma-es: the start needs one or more finite coordinates"));
        }
        if !(sigma > 0.0 && sigma.is_finite()) {
            return Err(Error::msg(format!("cma-es: the step size is {sigma}; it must be a number above 0")));
        }
        if population < 4 {
            return Err(Error::msg(format!("cma-es: {population} points a generation; it takes 4 or more")));
        }
        Ok(Self {
            strategy: Strategy::new(n, population),
            stream: Stream { seed: seed ^ PURPOSE, step: 0, site },
            generation: 0,
            mean: DVector::from_vec(mean),
            sigma,
            path_sigma: DVector::zeros(n),
            path_c: DVector::zeros(n),
            covariance: DMatrix::identity(n, n),
            vectors: DMatrix::identity(n, n),
            roots: DVector::repeat(n, 1.0),
            decomposed: 0,
        })
    }

    /// Coordinates.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.mean.len()
    }

    /// Points a generation.
    #[must_use]
    pub fn population(&self) -> usize {
        self.strategy.weights.len()
    }

    /// The mean of the distribution, which under noise is the better answer than the best point that was seen.
    #[must_use]
    pub fn mean(&self) -> &[f64] {
        self.mean.as_slice()
    }

    /// The step size.
    #[must_use]
    pub fn sigma(&self) -> f64 {
        self.sigma
    }

    /// Generations so far.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The points of the coming generation, which are the same however often they are asked for.
    ///
    /// # Errors
    /// After 2³² generations.
    pub fn ask(&self) -> Result<Vec<Vec<f64>>> {
        let step = u32::try_from(self.generation).map_err(|_| Error::msg("cma-es: a search has 2^32 generations"))?;
        let (n, stream) = (self.dim(), Stream { step, ..self.stream });
        let normals = stream.normal_vec(n * self.population(), 1.0);
        let point = |z: &[f32]| {
            let scaled = DVector::from_iterator(n, z.iter().zip(self.roots.iter()).map(|(z, d)| f64::from(*z) * d));
            let y = &self.vectors * scaled;
            self.mean.iter().zip(y.iter()).map(|(m, y)| m + self.sigma * y).collect()
        };
        Ok(normals.chunks_exact(n).map(point).collect())
    }

    /// Ends a generation with the value of each of its points ([`CmaEs::ask`]), of which lower is better; one that is not a
    /// number is the worst.
    ///
    /// # Errors
    /// Another number of points or coordinates than were asked for; a distribution that is no longer finite. Nothing is changed
    /// then.
    pub fn tell(&mut self, points: &[Vec<f64>], values: &[f64]) -> Result<()> {
        let (n, population) = (self.dim(), self.population());
        if points.len() != population || values.len() != population || points.iter().any(|p| p.len() != n) {
            return Err(Error::msg("cma-es: other points than were asked for"));
        }
        let before = self.clone();
        self.update(points, values);
        let finite = self.sigma.is_finite() && self.sigma > 0.0 && self.covariance.iter().all(|x| x.is_finite());
        let due = self.generation - self.decomposed > self.strategy.lazy_generations(n);
        let kept = if finite { if due { self.decompose() } else { Ok(()) } } else { Err(diverged()) };
        if kept.is_err() {
            *self = before;
        }
        kept
    }

    fn update(&mut self, points: &[Vec<f64>], values: &[f64]) {
        let (s, n) = (self.strategy.clone(), self.dim());
        let mut ranked: Vec<(f64, &Vec<f64>)> =
            values.iter().map(|v| if v.is_nan() { f64::INFINITY } else { *v }).zip(points).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        let steps: Vec<DVector<f64>> = ranked
            .iter()
            .map(|(_, x)| {
                let y = x.iter().zip(self.mean.iter()).map(|(x, m)| (x - m) / self.sigma);
                DVector::from_iterator(n, y)
            })
            .collect();
        let mut mean_step = DVector::zeros(n);
        for (w, y) in s.weights.iter().zip(&steps).take(s.parents) {
            mean_step.axpy(*w, y, 1.0);
        }
        self.mean.axpy(self.sigma, &mean_step, 1.0);

        let whitened = self.whiten(&mean_step);
        self.path_sigma *= 1.0 - s.c_sigma;
        self.path_sigma.axpy((s.c_sigma * (2.0 - s.c_sigma) * s.mu_eff).sqrt(), &whitened, 1.0);
        let length = self.path_sigma.norm();
        let started = 1.0 - (1.0 - s.c_sigma).powf(2.0 * (self.generation + 1) as f64);
        let h = if length / started.sqrt() < (1.4 + 2.0 / (n as f64 + 1.0)) * s.chi { 1.0 } else { 0.0 };
        self.path_c *= 1.0 - s.c_c;
        self.path_c.axpy(h * (s.c_c * (2.0 - s.c_c) * s.mu_eff).sqrt(), &mean_step, 1.0);

        let lost = (1.0 - h) * s.c_c * (2.0 - s.c_c);
        self.covariance *= 1.0 + s.c_1 * lost - s.c_1 - s.c_mu * s.weights.iter().sum::<f64>();
        self.covariance.ger(s.c_1, &self.path_c, &self.path_c, 1.0);
        for (w, y) in s.weights.iter().zip(&steps) {
            let w = if *w >= 0.0 { *w } else { w * n as f64 / self.whiten(y).norm_squared().max(f64::MIN_POSITIVE) };
            self.covariance.ger(s.c_mu * w, y, y, 1.0);
        }
        self.sigma *= ((s.c_sigma / s.d_sigma) * (length / s.chi - 1.0)).min(1.0).exp();
        self.generation += 1;
    }

    /// `C^{-1/2}·y`.
    fn whiten(&self, y: &DVector<f64>) -> DVector<f64> {
        let mut turned = self.vectors.tr_mul(y);
        turned.component_div_assign(&self.roots);
        &self.vectors * turned
    }

    fn decompose(&mut self) -> Result<()> {
        let n = self.dim();
        let symmetric = (&self.covariance + self.covariance.transpose()) * 0.5;
        let found = SymmetricEigen::try_new(symmetric.clone(), f64::EPSILON, 100 * n.max(10)).ok_or_else(diverged)?;
        let largest = found.eigenvalues.max();
        if !(largest > 0.0 && largest.is_finite()) {
            return Err(diverged());
        }
        self.roots = found.eigenvalues.map(|x| x.max(largest * LEAST_EIGENVALUE).sqrt());
        self.vectors = found.eigenvectors;
        self.covariance = symmetric;
        self.decomposed = self.generation;
        Ok(())
    }
}

fn diverged() -> Error {
    Error::msg(
        "cma-es: the distribution is no longer finite: the function has no minimum, or the step size is too large",
    )
}

/// Points a generation that the tutorial proposes for so many coordinates.
#[must_use]
pub fn default_population(dim: usize) -> usize {
    4 + (3.0 * (dim.max(1) as f64).ln()).floor() as usize
}

#[cfg(test)]
mod tests;
