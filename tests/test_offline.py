"""That a test which asked the network for something would fail, even one that answers for the network's absence."""

import socket

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0)])  # of documentation: nobody's
def test_no_test_reaches_out(address):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as outward, pytest.raises(pytest.fail.Exception, match=f"connects to .*{address[0]}"):
        try:
            outward.connect(address)
        except Exception:
            raise AssertionError("what libraries catch would pass unseen") from None


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 1) as client:
        client.sendall(b"x")
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(1) == b"x"
