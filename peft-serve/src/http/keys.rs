//! Who may ask, and for which models.

use std::fmt;
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};

use super::{ApiError, ServerOptions};
use crate::registry::RegistryError;

type KeyDigest = [u8; 32];

/// A key of the API. It is held as its SHA-256: comparing takes the same time wherever two keys differ.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey {
    digest: KeyDigest,
    access: Access,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("access", &self.access).finish_non_exhaustive()
    }
}

impl ApiKey {
    /// A key that may ask for every model.
    #[must_use]
    pub fn new(key: &str) -> Self {
        Self::from_sha256(digest(key))
    }

    /// The key with this SHA-256, which may ask for every model.
    #[must_use]
    pub fn from_sha256(digest: [u8; 32]) -> Self {
        Self { digest, access: Access::ALL }
    }

    /// The key, for these models alone: names of adapters or of the base, where a `*` at the end stands for any rest.
    #[must_use]
    pub fn only_for(self, models: impl IntoIterator<Item = String>) -> Self {
        Self { access: Access(Some(models.into_iter().collect())), ..self }
    }

    /// Whether the other is the same key, whatever it may ask for.
    #[must_use]
    pub fn is_same_key(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

/// Which models somebody may ask for; `None` is all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Access(Option<Arc<[String]>>);

impl Access {
    const ALL: Self = Self(None);

    /// Whether they may know of a model.
    pub(super) fn has(&self, model: &str) -> bool {
        let fits = |pattern: &String| match pattern.strip_suffix('*') {
            Some(start) => model.starts_with(start),
            None => pattern == model,
        };
        self.0.as_ref().is_none_or(|patterns| patterns.iter().any(fits))
    }

    /// Refuses a model that they may not ask for, as if it were not there.
    pub(super) fn check(&self, model: &str) -> Result<(), ApiError> {
        if self.has(model) { Ok(()) } else { Err(ApiError::no_model(model)) }
    }

    /// What they may know of a name that gives no adapter: the names that are near are not theirs to see.
    pub(super) fn tell(&self, error: RegistryError) -> ApiError {
        match error {
            RegistryError::Unknown { name, .. } if self.0.is_some() => ApiError::no_model(&name),
            other => other.into(),
        }
    }
}

fn digest(key: &str) -> KeyDigest {
    Sha256::digest(key.as_bytes()).into()
}

/// The keys of a server.
pub(super) struct Keys {
    api: Vec<ApiKey>,
    admin: Option<KeyDigest>,
}

impl Keys {
    pub(super) fn of(options: &ServerOptions) -> Self {
        Self { api: options.api_keys.clone(), admin: options.admin_key.as_deref().map(digest) }
    }

    fn given(headers: &HeaderMap) -> Option<KeyDigest> {
        let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| digest(key.trim()))
    }

    /// What who sent this may ask for; refuses who may not ask.
    pub(super) fn check_user(&self, headers: &HeaderMap) -> Result<Access, ApiError> {
        if self.api.is_empty() {
            return Ok(Access::ALL);
        }
        let given =
            Self::given(headers).ok_or_else(|| ApiError::key("an API key is missing: Authorization: Bearer …"))?;
        if self.admin == Some(given) {
            return Ok(Access::ALL);
        }
        let known = self.api.iter().find(|key| key.digest == given);
        known.map(|key| key.access.clone()).ok_or_else(|| ApiError::key("this API key is not known here"))
    }

    /// Refuses who may not change the adapters.
    pub(super) fn check_admin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(admin) = self.admin else {
            return Err(ApiError::forbidden(
                "the server was started without an admin key, so its adapters stay as they are",
            ));
        };
        match Self::given(headers) {
            Some(given) if given == admin => Ok(()),
            Some(_) => Err(ApiError::key("this is not the admin key")),
            None => Err(ApiError::key("the admin key is missing: Authorization: Bearer …")),
        }
    }
}
