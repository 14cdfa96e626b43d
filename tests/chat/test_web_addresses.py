"""Where the page is served, under which names, and to whom."""

import socket
from ipaddress import ip_address

import pytest

import main as spot_check
from harmful_unlearn.chat.web import ChatServer, port_number
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.inference.generation import Decoding
from tests.helpers.servers.chat_server import GOOD, send, serving
from tests.helpers.servers.conversations import Scripted
from tests.helpers.servers.http import served


@pytest.fixture
def server():
    with serving(Scripted("base", "Yes.")) as server:
        yield server


@pytest.mark.parametrize("path", ["/", "/events"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "192.0.2.1", "", "["])
def test_names_of_other_sites_are_refused(path, host, server):
    """DNS rebinding: a site whose name leads to 127.0.0.1."""
    status, _, text = send(server, "GET", path, Host=host)
    assert status == 403 and "base" not in text
    assert send(server, "POST", "/ask", GOOD, Host=host)[0] == 403 and not server.events


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "LOCALHOST:1", "[::1]:80"])
def test_names_of_this_machine_are_not(host, server):
    assert send(server, "GET", "/", Host=host)[0] == 200
    assert send(server, "POST", "/ask", GOOD, Host=host, Origin=f"http://{host}")[0] == 200


def test_ports(capsys):
    with serving() as server, pytest.raises(UserError, match="in use.*give another --port"):
        ChatServer("127.0.0.1", server.server_address[1], Decoding(), 0)
    for wrong in ("65536", "-1", "x"):
        with pytest.raises(SystemExit):
            spot_check.parse_flags(["--web", "--port", wrong])
        assert "--port: give a " in capsys.readouterr().err
    assert port_number("65535") == 65535
    for wrong in ("192.0.2.1", "a..b"):
        with pytest.raises(UserError, match=f"cannot listen on {wrong}:0 .*another --host"):
            ChatServer(wrong, 0, Decoding(), 0)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "opened", "warns"),
    [
        ("127.0.0.1", "http://127.0.0.1:{port} in a browser (", False),
        ("localhost", "http://localhost:{port} in a browser (", False),
        ("127.1", "http://127.1:{port} in a browser (", False),
        ("::1", "http://[::1]:{port} in a browser (", False),
        ("0.0.0.0", "http://127.0.0.1:{port} in a browser, elsewhere http://{machine}:{port} (", True),
        ("", "http://127.0.0.1:{port} in a browser, elsewhere http://{machine}:{port} (", True),
        ("::", "http://[::1]:{port} in a browser, elsewhere http://{machine}:{port} (", True),
    ],
)
def test_only_this_machine_is_served_unless_asked(host, opened, warns, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr(ChatServer, "serve_forever", interrupt)
    with ChatServer(host, 0, Decoding(), 0) as server:
        server.run()
        address, port = server.socket.getsockname()[:2]
    assert ip_address(address).is_loopback is not warns
    said = capsys.readouterr()
    assert said.err.startswith("warning: whoever reaches this machine can talk") is warns and warns or said.err == ""
    assert f"open {opened.format(port=port, machine=socket.gethostname())}" in said.out
    assert "the server has ended" in said.out


def test_a_name_of_this_machine_does_not_warn(monkeypatch, capsys):
    """As a line of /etc/hosts makes one."""
    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **how: found("127.0.0.1", *more, **how))
    with ChatServer("My-Box", 0, Decoding(), 0) as server:
        monkeypatch.undo()
        with served(server):
            assert server.is_private and server.address.startswith("http://My-Box:")
            assert send(server, "GET", "/", Host="my-box:80")[0] == 200
            assert send(server, "GET", "/", Host="your-box")[0] == 403


def test_what_is_served_to_the_network_answers_to_names_of_its_own_only():
    """A site can have a name that leads here, but no such address."""
    with serving(Scripted("base", "Yes."), host="0.0.0.0") as server:
        for host in ("192.0.2.1:80", "[2001:db8::1]", socket.gethostname(), "localhost"):
            assert send(server, "GET", "/", Host=host)[0] == 200
        for host in ("evil.example", "192.0.2.1.evil.example", f"{socket.gethostname()}.evil.example", ""):
            assert send(server, "GET", "/events", Host=host)[0] == 403
        assert send(server, "POST", "/ask", GOOD, Host="192.0.2.1", Origin="http://evil.example")[0] == 403
        assert send(server, "POST", "/ask", GOOD, Host="192.0.2.1", Origin="http://192.0.2.1")[0] == 200
