//! What happens to every request, whoever sent it. From the outside in: [`request_id`], [`observe`], [`measure`],
//! [`access_log`], [`headers`], [`cors`], [`refuse`], [`origin`], [`limit`].

pub mod access_log;
pub mod cors;
pub mod headers;
pub mod limit;
pub mod measure;
pub mod observe;
pub mod origin;
pub mod refuse;
pub mod request_id;
