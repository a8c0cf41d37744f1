//! Devices that fail under a server and its clients: a port that goes down, a device that is removed. The
//! processes that use them end with each test, so that the devices can be made anew: this one opens none.

use std::process::{Command, Stdio};

use raio_e2e::{Cut, Flood, LISTEN, Replug, Server, TCP, needs_wire, numbers, replug};

/// Some more is read by those who are still there.
fn should_continue(server: &mut Server, floods: &mut [&mut Flood]) {
    let read = |server: &mut Server| server.statistics()["read_bytes"].as_u64().expect("a number");
    let before = read(server);
    server.statistics_when(|statistics| statistics["read_bytes"].as_u64() > Some(before + (64 << 20)));
    for flood in floods {
        assert!(flood.is_alive(), "{}", flood.fails());
    }
}

/// One more client, by the device itself: it comes from the address that it goes to.
fn flood_within_rxe0(url: &str) -> Flood {
    let rule = |action: &str| {
        let rule = ["pref", "4", "iif", "lo", "from", "0.0.0.0/32", "to", "10.77.0.1", "lookup", "102"];
        let status = Command::new("ip").args(["rule", action]).args(rule).status().expect("ip");
        assert!(status.success(), "ip rule {action}");
    };
    rule("del");
    let flood = Flood::start(url, "/d/numbers");
    rule("add");
    flood
}

#[test]
fn when_a_device_is_removed_its_connections_end_with_a_sentence_and_others_go_on() {
    let Some(_wire) = needs_wire("removing a device") else { return };
    let _replug = Replug;
    let (_directory, export) = numbers();
    let listens = [LISTEN, "rdma://10.77.0.2:0", TCP].map(|url| ["--listen", url]).concat();
    let mut server =
        Server::start_with(&[&export], &[&["--memory", "64M", "--linger", "0"], &listens[..]].concat());
    let urls = server.urls();
    // From rxe1 to rxe0, the other way, within rxe0, and by TCP.
    let mut from = Flood::start(&urls[0], "/d/numbers");
    let mut to = Flood::start(&urls[1], "/d/numbers");
    let mut within = flood_within_rxe0(&urls[0]);
    let mut tcp = Flood::start(&urls[2], "/d/numbers");
    // It returns once no process has the device open any more.
    let mut removal = Command::new("rdma")
        .args(["link", "delete", "rxe1"])
        .stderr(Stdio::inherit())
        .spawn()
        .expect("rdma link delete");
    let said = from.fails();
    assert!(said.contains("its RDMA device was removed"), "{said}");
    let said = to.fails();
    assert!(said.contains("the connection has ended"), "{said}");
    should_continue(&mut server, &mut [&mut within, &mut tcp]);
    server.statistics_when(|statistics| statistics["connections"] == 4);
    drop((within, tcp, server));
    assert!(removal.wait().expect("rdma link delete ends").success());
}

#[test]
fn when_a_port_goes_down_its_connections_end_with_a_sentence_and_tcp_goes_on() {
    let Some(_wire) = needs_wire("a port that goes down") else { return };
    let _replug = Replug;
    let (_directory, export) = numbers();
    let mut server = Server::start_with(
        &[&export],
        &["--memory", "64M", "--linger", "0", "--listen", LISTEN, "--listen", TCP],
    );
    let urls = server.urls();
    let mut rdma = Flood::start(&urls[0], "/d/numbers");
    let mut tcp = Flood::start(&urls[1], "/d/numbers");
    let cut = Cut::new();
    let said = rdma.fails();
    assert!(said.contains("the connection has ended"), "{said}");
    should_continue(&mut server, &mut [&mut tcp]);
    server.statistics_when(|statistics| statistics["connections"] == 2);
    drop((tcp, server, cut));
    replug();
    let server = Server::start_with(&[&export], &["--memory", "64M", "--linger", "0", "--listen", LISTEN]);
    assert!(Flood::start(&server.url(), "/d/numbers").is_alive());
}
