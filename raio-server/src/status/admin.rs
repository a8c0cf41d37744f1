//! What only administrators and watchers that have the token may ask for: [`crate::control`] over HTTP.

use std::sync::Arc;
use std::time::Instant;

use super::{Observed, Route};
use crate::control::{Kill, LiveTrace, NotDone, SlowList};
use crate::http::{Access, Answer, Later, Next, Parts, Request, Response};

type Handler = fn(&Arc<Observed>, &Request<'_>) -> Answer;

const fn private(path: &'static str, answer: Handler) -> Route {
    Route { method: "GET", path, access: Access::Private, answer }
}

const fn order(method: &'static str, path: &'static str, answer: Handler) -> Route {
    Route { method, path, access: Access::Admin, answer }
}

/// What can be asked for.
pub const ROUTES: &[Route] = &[
    private("/sessions", sessions),
    private("/exports", |it, _| json(it.control.exports())),
    private("/workers", workers),
    private("/slow", slow),
    order("GET", "/trace", trace),
    order("POST", "/drain", drain),
    order("POST", "/kill", kill),
];

fn json(body: String) -> Answer {
    Answer::Now(response(body))
}

fn response(body: String) -> Response {
    Response::json(200, body + "\n")
}

fn not_done(NotDone { status, text }: &NotDone) -> Response {
    Response::error(*status, text)
}

/// The number that a parameter has.
fn number(request: &Request<'_>, name: &str) -> Result<Option<u64>, Response> {
    let Some(text) = request.parameter(name) else { return Ok(None) };
    let digits = text.bytes().all(|byte| byte.is_ascii_digit()) && text.len() <= 9;
    match text.parse() {
        Ok(number) if digits => Ok(Some(number)),
        _ => {
            Err(Response::error(400, &format!("{name}={text} is no number. Write one of at most 9 digits.")))
        }
    }
}

fn sessions(it: &Arc<Observed>, request: &Request<'_>) -> Answer {
    match number(request, "top") {
        Ok(top) => json(it.control.sessions(top.map(|top| top as usize), request.now)),
        Err(response) => Answer::Now(response),
    }
}

fn workers(it: &Arc<Observed>, request: &Request<'_>) -> Answer {
    it.control.look(request.now);
    Answer::Later(Box::new(Workers(Arc::clone(it))))
}

/// The workers, when it is known which of them go on.
struct Workers(Arc<Observed>);

impl Later for Workers {
    fn poll(&mut self, now: Instant) -> Next<Response> {
        match self.0.control.known_at(now) {
            None => Next::Ready(response(self.0.control.workers(now))),
            Some(again) => Next::At(again),
        }
    }
}

fn slow(it: &Arc<Observed>, request: &Request<'_>) -> Answer {
    Answer::Later(Box::new(Slow { list: it.control.slow(request.now), of: Arc::clone(it) }))
}

struct Slow {
    of: Arc<Observed>,
    list: SlowList,
}

impl Later for Slow {
    fn poll(&mut self, now: Instant) -> Next<Response> {
        match self.list.poll(now) {
            Next::Ready(()) => Next::Ready(response(self.of.control.slow_answer(&self.list, now))),
            Next::At(again) => Next::At(again),
        }
    }
}

fn drain(it: &Arc<Observed>, _: &Request<'_>) -> Answer {
    it.control.drain();
    Answer::Now(Response::json(202, "{\"draining\":true}\n".to_owned()))
}

fn kill(it: &Arc<Observed>, request: &Request<'_>) -> Answer {
    let id = request.parameter("session").unwrap_or_default();
    match it.control.kill(id, &request.user(), request.now) {
        Ok(kill) => Answer::Later(Box::new(kill)),
        Err(why) => Answer::Now(not_done(&why)),
    }
}

impl Later for Kill {
    fn poll(&mut self, now: Instant) -> Next<Response> {
        match self.ended(now) {
            Next::Ready(Ok(id)) => Next::Ready(response(format!("{{\"killed\":\"{id}\"}}"))),
            Next::Ready(Err(why)) => Next::Ready(not_done(&why)),
            Next::At(again) => Next::At(again),
        }
    }
}

fn trace(it: &Arc<Observed>, request: &Request<'_>) -> Answer {
    let seconds = match number(request, "seconds") {
        Ok(seconds) => seconds.unwrap_or(1),
        Err(response) => return Answer::Now(response),
    };
    match it.control.trace(seconds, request.now) {
        Ok(trace) => Answer::Stream("application/json", Box::new(trace)),
        Err(why) => Answer::Now(not_done(&why)),
    }
}

impl Parts for LiveTrace {
    fn poll(&mut self, now: Instant) -> Next<Option<String>> {
        self.next_part(now)
    }
}
