//! The dashboard and the alerts of `contrib/`: their expressions use metrics and labels of a server, and a
//! real Prometheus computes each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use raio_e2e::{Client, PATIENCE, Site, await_http, await_log, binary};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

fn contrib(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib").join(name)
}

fn is_there(program: &str) -> bool {
    let is_there = Command::new(program).arg("--version").output().is_ok();
    if !is_there {
        eprintln!("SKIPPED: what needs {program}. Install it: scripts/need promtool=prometheus");
    }
    is_there
}

/// Runs promtool with this as its standard input. It must succeed.
fn promtool(arguments: &[&str], input: &str) -> String {
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(contrib("prometheus"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool runs");
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("promtool reads");
    let out = child.wait_with_output().expect("it ends");
    let said = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(out.status.success(), "promtool {arguments:?}: {said}");
    said
}

/// The expressions of the dashboard, and the queries of its variables, as Grafana sends them.
fn dashboard() -> Vec<String> {
    fn collect(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("expr").and_then(Value::as_str).map(str::to_owned));
                found.extend(fields.get("definition").and_then(Value::as_str).map(|query| {
                    // label_values(SELECTOR, LABEL)
                    let arguments = query.strip_prefix("label_values(").and_then(|it| it.strip_suffix(')'));
                    let (selector, label) = arguments.and_then(|it| it.rsplit_once(", ")).expect("a query");
                    format!("count by ({label}) ({selector})")
                }));
                fields.values().for_each(|field| collect(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
            _ => {}
        }
    }
    let text = fs::read_to_string(contrib("grafana/raio.json")).expect("a file");
    let mut found = Vec::new();
    collect(&serde_json::from_str(&text).expect("JSON"), &mut found);
    assert!(found.len() > 30, "{found:?}");
    let mut variables = ["$instance", "$export", "$op"].map(|name| (name, ".*")).to_vec();
    variables.push(("$__rate_interval", "1m"));
    for expression in &mut found {
        variables.iter().for_each(|(name, value)| *expression = expression.replace(name, value));
        assert!(!expression.contains('$'), "{expression} has a variable that this test does not know");
    }
    found
}

/// The expressions of the alerts. Their lines begin so, or follow a line that ends so.
fn alerts() -> Vec<String> {
    let text = fs::read_to_string(contrib("prometheus/raio.rules.yml")).expect("a file");
    let mut found: Vec<String> = Vec::new();
    let mut is_within = false;
    for line in text.lines() {
        let folded = line.starts_with("          ");
        match line.trim().strip_prefix("expr: ") {
            Some(">-") => {
                found.push(String::new());
                is_within = true;
            }
            Some(expression) => found.push(expression.to_owned()),
            None if is_within && folded => {
                found.last_mut().expect("one").push_str(&format!(" {}", line.trim()))
            }
            None => is_within = false,
        }
    }
    assert_eq!(found.len(), text.matches("- alert: ").count());
    found
}

/// The metrics of an expression with the labels that it uses of each. Labels of `by (...)` count for all of
/// them. No expression has a comma within a string.
fn used(expression: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut metrics = BTreeMap::<String, BTreeSet<String>>::new();
    let mut grouped = Vec::new();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = expression;
    while let Some(at) = rest.find(|c: char| is_name(c) || c == '"') {
        rest = &rest[at..];
        if let Some(string) = rest.strip_prefix('"') {
            rest = string.split_once('"').expect("a string ends").1;
            continue;
        }
        let (name, behind) = rest.split_at(rest.find(|c| !is_name(c)).unwrap_or(rest.len()));
        rest = behind;
        if name == "by" {
            let (labels, behind) = rest.trim_start()[1..].split_once(')').expect("labels end");
            grouped.extend(labels.split(',').map(|label| label.trim().to_owned()));
            rest = behind;
        } else if name.starts_with("raio_") || name == "up" {
            let labels = metrics.entry(name.to_owned()).or_default();
            if let Some(selector) = rest.strip_prefix('{') {
                let (selector, behind) = selector.split_once('}').expect("a selector ends");
                let names = selector.split(',').filter_map(|one| one.split(['=', '!']).next());
                labels.extend(names.filter(|name| !name.is_empty()).map(|name| name.trim().to_owned()));
                rest = behind;
            }
        }
    }
    metrics.values_mut().for_each(|labels| labels.extend(grouped.iter().cloned()));
    metrics
}

/// The metrics of a scrape, with their labels.
fn exposed(scrape: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut metrics = BTreeMap::<String, BTreeSet<String>>::new();
    for line in scrape.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (name, labels) = match line.split_once('{') {
            Some((name, rest)) => (name, rest.rsplit_once('}').expect("labels end").0),
            None => (line.split_once(' ').expect("a value").0, ""),
        };
        // No name of this test has a comma or an equals sign.
        let names =
            labels.split(',').filter_map(|label| label.split_once('=')).map(|(name, _)| name.to_owned());
        metrics.entry(name.to_owned()).or_default().extend(names);
    }
    metrics
}

/// A server with clients, an audit log and errors.
struct Observed {
    site: Site,
    client: Client,
    data: TempDir,
    /// Where it serves metrics.
    http: String,
}

impl Observed {
    fn start() -> Self {
        let client = Client::new();
        let data = tempfile::tempdir().expect("a directory");
        let path = |name: &str| data.path().join(name).to_str().expect("UTF-8").to_owned();
        fs::create_dir(path("export")).expect("a directory");
        fs::write(path("file"), vec![1; 3 << 20]).expect("a file");
        fs::write(path("token"), "letmein-letmein-letmein\n").expect("a file");
        fs::set_permissions(path("token"), fs::Permissions::from_mode(0o600)).expect("it is ours");
        let (admin, audit, token) = (path("admin"), path("audit"), path("token"));
        let site = Site::open_to_users(
            &client.entry("tester", "exports = { data = 'rw' }"),
            &data.path().join("export"),
            &["--admin", &admin, "--audit", &audit, "--http", "127.0.0.1:0", "--http-token", &token],
            Some(File::create(path("log")).expect("a log")),
        );
        client.trust(&site);
        let http = await_http(&data.path().join("log"));
        let observed = Self { site, client, http, data };
        observed.work();
        observed
    }

    fn raio(&self, arguments: &[&str], code: i32) {
        let mut command = Command::new(binary("raio"));
        command.args(arguments).arg("--keys").arg(self.client.keys.path());
        command.env("RAIO_URL", self.site.server.url()).current_dir(self.data.path());
        let out = command.output().expect("raio runs");
        assert_eq!(out.status.code(), Some(code), "{}", String::from_utf8_lossy(&out.stderr));
    }

    /// Reads, writes, something that fails, and a reload.
    fn work(&self) {
        self.site.server.signal(Signal::HUP);
        self.raio(&["cp", "file", ":/data/file"], 0);
        self.raio(&["cp", ":/data/file", "back"], 0);
        self.raio(&["stat", ":/data/missing"], 3);
    }

    /// What it exposes to the administrator.
    fn scrape(&self) -> String {
        let mut stream = UnixStream::connect(self.data.path().join("admin")).expect("an admin socket");
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        body(&answer).to_owned()
    }
}

/// The body of a response that has succeeded.
fn body(response: &str) -> &str {
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 "), "{response}");
    assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "this test knows no chunks: {head}");
    body
}

/// A Prometheus that scrapes a server.
struct Prometheus {
    child: Child,
    address: String,
    _directory: TempDir,
}

impl Prometheus {
    fn start(observed: &Observed) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        let configuration = json!({
            "global": { "scrape_interval": "500ms", "evaluation_interval": "500ms" },
            "rule_files": [contrib("prometheus/raio.rules.yml").canonicalize().expect("a file")],
            "scrape_configs": [{
                "job_name": "raio",
                "authorization": { "credentials_file": observed.data.path().join("token") },
                "static_configs": [{ "targets": [observed.http] }],
            }],
        });
        // JSON is YAML.
        fs::write(path("prometheus.yml"), configuration.to_string()).expect("a file");
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", path("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", path("data").display()));
        command.args(["--web.listen-address=127.0.0.1:0", "--log.format=json"]);
        let log = File::create(path("log")).expect("a log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("prometheus runs");
        let log = await_log(&path("log"), r#""msg":"Listening on","#);
        let line = log.lines().find(|line| line.contains("Listening on")).expect("it was found");
        let line: Value = serde_json::from_str(line).expect("JSON");
        let address = line["address"].as_str().expect("an address").to_owned();
        Self { child, address, _directory: directory }
    }

    /// What it answers to a request of its HTTP API.
    fn get(&self, target: &str) -> Value {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        // HTTP/1.0 has no chunks.
        stream.write_all(format!("GET /api/v1/{target} HTTP/1.0\r\n\r\n").as_bytes()).expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    /// What an expression is now: a value for each set of labels.
    fn query(&self, expression: &str) -> Vec<Value> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.get(&format!("query?query={encoded}"));
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{answer}")).clone()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_dashboard_and_the_alerts_use_what_a_server_exposes() {
    let scrape = Observed::start().scrape();
    let mut exposed = exposed(&scrape);
    exposed.insert("up".into(), BTreeSet::new());
    // Prometheus adds these.
    exposed.values_mut().for_each(|labels| labels.extend(["job", "instance"].map(String::from)));
    for expression in dashboard().into_iter().chain(alerts()) {
        let used = used(&expression);
        assert!(!used.is_empty(), "{expression} has no metric");
        for (metric, labels) in used {
            let known = exposed.get(&metric);
            let known = known.unwrap_or_else(|| panic!("{metric} of {expression} is not in\n{scrape}"));
            let unknown: Vec<_> = labels.difference(known).collect();
            assert!(unknown.is_empty(), "{metric} has no label {unknown:?}, but {expression} uses it");
        }
    }
    if is_there("promtool") {
        promtool(&["check", "metrics"], &scrape);
    }
}

#[test]
fn prometheus_computes_each_expression_of_the_dashboard_and_no_alert_fires() {
    if !is_there("prometheus") {
        return;
    }
    let observed = Observed::start();
    let prometheus = Prometheus::start(&observed);
    let deadline = Instant::now() + 3 * PATIENCE;
    // A rate takes two scrapes, with something in between. What nobody has done has none.
    let mut missing = dashboard();
    while !missing.is_empty() {
        assert!(Instant::now() < deadline, "Prometheus has no value of {missing:#?}");
        observed.work();
        missing.retain(|expression| prometheus.query(expression).is_empty());
    }
    let rules = prometheus.get("rules");
    let rules = rules["data"]["groups"].as_array().expect("groups").iter();
    let rules: Vec<_> = rules.flat_map(|group| group["rules"].as_array().expect("rules")).collect();
    assert_eq!(rules.len(), alerts().len());
    for rule in rules {
        assert_eq!((&rule["health"], &rule["state"]), (&"ok".into(), &"inactive".into()), "{rule}");
    }
    for alert in alerts() {
        assert_eq!(prometheus.query(&alert), [] as [Value; 0], "{alert}");
    }
}

#[test]
fn the_expressions_are_valid_and_the_alerts_fire_when_they_should() {
    if !is_there("promtool") {
        return;
    }
    promtool(&["check", "rules", "raio.rules.yml"], "");
    promtool(&["test", "rules", "raio.rules.test.yml"], "");
    let record =
        |(at, expression): (usize, String)| json!({ "record": format!("panel{at}"), "expr": expression });
    let rules: Vec<_> = dashboard().into_iter().enumerate().map(record).collect();
    let file = tempfile::Builder::new().suffix(".yml").tempfile().expect("a file");
    // JSON is YAML.
    fs::write(file.path(), json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string())
        .expect("a file");
    promtool(&["check", "rules", file.path().to_str().expect("UTF-8")], "");
}

#[test]
fn an_expression_is_taken_apart() {
    let of = |expression| {
        let text = |(name, labels): (String, BTreeSet<String>)| {
            labels.into_iter().fold(name, |text, label| format!("{text} {label}"))
        };
        used(expression).into_iter().map(text).collect::<Vec<_>>()
    };
    assert_eq!(of(r#"up{job="raio_x"} == 0"#), ["up job"]);
    assert_eq!(
        of(r#"sum by (a, le) (rate(raio_b{c=~"d|by",f!="g"}[5m])) / sum by (a) (raio_h)"#),
        ["raio_b a c f le", "raio_h a le"]
    );
}
