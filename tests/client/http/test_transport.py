"""How answers come back whole over a bad link: what is sent again, what is refused, what the errors say."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest

from softlabels.errors import (
    FingerprintMismatchError,
    RequestError,
    RowsNotCommittedError,
    ServerUnreachableError,
    TruncatedError,
    UnauthorizedError,
    WireError,
)
from softlabels.wire import to_problem
from softlabels_client import HttpTransport, RetryPolicy, parse_address

BODY = bytes(range(256)) * 40
MOST = 1 << 20


def transport(peer: Any, retry: RetryPolicy, **settings: Any) -> HttpTransport:
    """A transport to the peer."""
    return HttpTransport(parse_address(f"{peer.url}/tiny"), retry=retry, **settings)


def problem(error: Any) -> dict[str, Any]:
    """What a server's answer to an error holds, as arguments of `Peer.whole`."""
    body = json.dumps(to_problem(error)).encode()
    return {"status": error.status, "body": body, "Content_Type": "application/problem+json; charset=utf-8"}


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """An answer in chunks, as a proxy may cut it."""
    parts = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + end


class TestAnswers:
    def test_a_body_comes_whole_and_read_only(self, peer: Any, quick: RetryPolicy) -> None:
        """Every byte, in a buffer that nobody can change by mistake."""
        peer.acts = [peer.whole(200, BODY, X_Extra="1")]
        reply = transport(peer, quick).request("GET", "/x", max_bytes=MOST)
        assert reply.body == BODY
        assert reply.body.readonly
        assert reply.headers["x-extra"] == "1"

    def test_connections_are_used_again(self, peer: Any, quick: RetryPolicy) -> None:
        """A hundred requests are one connection."""
        peer.acts = [peer.whole(200, BODY)]
        link = transport(peer, quick)
        for _ in range(100):
            link.request("POST", "/x", body=b"12345678", max_bytes=MOST)
        assert {asked.connection for asked in peer.asked} == {1}
        assert {asked.body for asked in peer.asked} == {b"12345678"}

    def test_a_token_travels_in_the_header_that_is_meant_for_it(self, peer: Any, quick: RetryPolicy) -> None:
        """And in no message or URL."""
        peer.acts = [peer.whole(200, b"")]
        transport(peer, quick, token="s3cret").request("GET", "/x", max_bytes=MOST)
        assert peer.asked[0].headers["authorization"] == "Bearer s3cret"
        assert "s3cret" not in peer.asked[0].target

    @pytest.mark.parametrize("token", ["", "a\r\nX: y", "ключ"])
    def test_a_token_that_no_header_can_carry_is_refused(self, token: str) -> None:
        """Before anything is sent, and without repeating it."""
        with pytest.raises(RequestError, match="token"):
            HttpTransport(parse_address("http://host/tiny"), token=token)

    @pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
    def test_a_timeout_has_to_be_a_time(self, timeout_s: float) -> None:
        """Zero, negative, endless and NaN are refused."""
        with pytest.raises(RequestError, match="timeout_s"):
            HttpTransport(parse_address("http://host/tiny"), timeout_s=timeout_s)

    def test_a_proxys_chunks_are_joined(self, peer: Any, quick: RetryPolicy) -> None:
        """A length is not needed where the end shows."""
        peer.acts = [peer.raw(chunked(BODY[:10], BODY[10:]))]
        assert transport(peer, quick).request("GET", "/x", max_bytes=MOST).body == BODY

    def test_ipv6(self, quick: RetryPolicy) -> None:
        """A bracketed address reaches its host."""
        try:
            listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
        with listener, ThreadPoolExecutor(1) as pool:

            def answer() -> bytes:
                connection, _ = listener.accept()
                with connection:
                    request = connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                    return request

            answering = pool.submit(answer)
            port = listener.getsockname()[1]
            link = HttpTransport(parse_address(f"http://[::1]:{port}/tiny"), retry=quick)
            assert link.request("GET", "/x", max_bytes=MOST).body == b"ok"
            assert f"Host: [::1]:{port}".encode() in answering.result()


class TestRetries:
    @pytest.mark.parametrize("fault", ["hang_up", "reset"])
    def test_a_broken_connection_is_tried_again(self, peer: Any, quick: RetryPolicy, fault: str) -> None:
        """Reads are safe to repeat."""
        peer.acts = [getattr(peer, fault), getattr(peer, fault), peer.whole(200, BODY)]
        assert transport(peer, quick).request("GET", "/x", max_bytes=MOST).body == BODY
        assert len(peer.asked) == 3

    def test_a_cut_answer_is_fetched_again(self, peer: Any, quick: RetryPolicy) -> None:
        """The half that came is thrown away."""
        peer.acts = [peer.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"), peer.whole(200, BODY)]
        assert transport(peer, quick).request("GET", "/x", max_bytes=MOST).body == BODY

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
            chunked(b"whole chunk", end=b""),
            chunked(b"one", end=b"a\r\nhalf"),
        ],
        ids=["length", "no last chunk", "half a chunk"],
    )
    def test_an_answer_that_is_cut_each_time_is_an_error(self, peer: Any, quick: RetryPolicy, answer: bytes) -> None:
        """It is never handed on as a short one."""
        peer.acts = [peer.raw(answer)]
        with pytest.raises(TruncatedError, match="cut"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)
        assert len(peer.asked) == quick.attempts_at_first

    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_a_busy_server_is_asked_again(self, peer: Any, quick: RetryPolicy, status: int) -> None:
        """What passes by itself is waited for."""
        peer.acts = [peer.whole(status, b""), peer.whole(200, BODY)]
        assert transport(peer, quick).request("GET", "/x", max_bytes=MOST).body == BODY

    def test_retry_after_is_heeded(self, peer: Any, quick: RetryPolicy) -> None:
        """The server's wish is waited out."""
        peer.acts = [peer.whole(503, b"", Retry_After="1"), peer.whole(200, BODY)]
        began = time.monotonic()
        transport(peer, quick).request("GET", "/x", max_bytes=MOST)
        assert time.monotonic() - began >= 1.0

    def test_a_wish_beyond_the_deadline_ends_it_at_once(self, peer: Any, quick: RetryPolicy) -> None:
        """There is no sense in waiting for what would come too late."""
        peer.acts = [peer.whole(503, b"", Retry_After="60")]
        began = time.monotonic()
        with pytest.raises(ServerUnreachableError):
            transport(peer, quick, timeout_s=5).request("GET", "/x", max_bytes=MOST)
        assert time.monotonic() - began < 1.0
        assert len(peer.asked) == 1

    def test_a_server_that_has_answered_gets_more_patience(self, peer: Any, quick: RetryPolicy) -> None:
        """It is probably restarting; one that never answered is probably another address."""
        peer.acts = [peer.whole(200, BODY), *[peer.closing(peer.whole(503, b""))] * 7, peer.whole(200, BODY)]
        link = transport(peer, quick)
        link.request("GET", "/x", max_bytes=MOST)
        assert link.request("GET", "/x", max_bytes=MOST).body == BODY

    def test_a_connection_closed_while_idle_costs_no_retry(self, peer: Any) -> None:
        """Servers close idle connections, which is no failure: not even a policy without retries notices."""
        once = RetryPolicy(attempts=1, attempts_at_first=1)
        peer.acts = [peer.closing(peer.whole(200, BODY))]
        link = transport(peer, once)
        for _ in range(5):
            assert link.request("GET", "/x", max_bytes=MOST).body == BODY
            time.sleep(0.01)
        assert {asked.connection for asked in peer.asked} == {1, 2, 3, 4, 5}

    @pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500, 501, 301])
    def test_what_a_retry_cannot_mend_is_not_retried(self, peer: Any, quick: RetryPolicy, status: int) -> None:
        """One request, one error."""
        peer.acts = [peer.whole(status, b"<html>", Content_Type="text/html", Location="http://elsewhere/")]
        with pytest.raises((RequestError, ServerUnreachableError)):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)
        assert len(peer.asked) == 1


class TestDeadline:
    @pytest.mark.parametrize("fault", ["stall", "drip"])
    def test_a_slow_answer_ends_at_the_deadline(self, peer: Any, quick: RetryPolicy, fault: str) -> None:
        """Also where each single read is quick."""
        peer.acts = [getattr(peer, fault)]
        began = time.monotonic()
        with pytest.raises(ServerUnreachableError, match=r"within 0\.5 s"):
            transport(peer, quick, timeout_s=0.5).request("GET", "/x", max_bytes=MOST)
        assert 0.4 < time.monotonic() - began < 3.0

    def test_a_connection_that_timed_out_is_never_used_again(self, peer: Any, quick: RetryPolicy) -> None:
        """Its late answer would be taken for that of the next request."""
        peer.acts = [peer.stall, peer.whole(200, BODY)]
        link = transport(peer, quick, timeout_s=0.3)
        with pytest.raises(ServerUnreachableError):
            link.request("GET", "/x", max_bytes=MOST)
        assert link.request("GET", "/x", max_bytes=MOST).body == BODY
        assert [asked.connection for asked in peer.asked] == [1, 2]


class TestRefusals:
    def test_nobody_listening_says_what_to_check(self, quick: RetryPolicy) -> None:
        """The URL, and that `softlabels serve` has to run there."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        link = HttpTransport(parse_address(f"http://127.0.0.1:{port}/tiny"), retry=quick)
        with pytest.raises(ServerUnreachableError, match=f"http://127.0.0.1:{port}/x.*`softlabels serve` runs there"):
            link.request("GET", "/x", max_bytes=MOST)

    def test_a_host_without_a_name_says_so(self, quick: RetryPolicy) -> None:
        """A misspelt name ends as any server that cannot be reached."""
        link = HttpTransport(parse_address("http://no-such-host.invalid/tiny"), retry=quick, timeout_s=20)
        with pytest.raises(ServerUnreachableError, match=r"no-such-host\.invalid"):
            link.request("GET", "/x", max_bytes=MOST)

    def test_the_servers_error_is_raised_again(self, peer: Any, quick: RetryPolicy) -> None:
        """Same class, same words, same facts."""
        error = FingerprintMismatchError("other data", store="a", yours="b")
        peer.acts = [peer.whole(**problem(error))]
        with pytest.raises(FingerprintMismatchError, match="other data") as caught:
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)
        assert caught.value.context == {"store": "a", "yours": "b"}

    def test_an_unknown_code_becomes_the_nearest_class(self, peer: Any, quick: RetryPolicy) -> None:
        """A newer server's error is still the caller's affair."""
        document = {**to_problem(RowsNotCommittedError("later")), "code": "from-the-future", "status": 422}
        peer.acts = [peer.whole(422, json.dumps(document).encode(), Content_Type="application/problem+json")]
        with pytest.raises(RequestError, match="later"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)

    @pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
    def test_broken_problem_details_are_no_reason(self, peer: Any, quick: RetryPolicy, body: bytes) -> None:
        """The status is told instead."""
        peer.acts = [peer.whole(500, body, Content_Type="application/problem+json")]
        with pytest.raises(ServerUnreachableError, match="status 500"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)

    def test_a_missing_token_is_named(self, peer: Any, quick: RetryPolicy) -> None:
        """A gateway that asks for one need not speak our language."""
        peer.acts = [peer.whole(401, b"who are you?")]
        with pytest.raises(UnauthorizedError, match="token"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)

    def test_a_redirect_is_told_and_not_followed(self, peer: Any, quick: RetryPolicy) -> None:
        """The token must not go to whoever a redirect names."""
        peer.acts = [peer.whole(307, b"", Location="http://elsewhere/tiny")]
        with pytest.raises(RequestError, match="http://elsewhere/tiny"):
            transport(peer, quick, token="s3cret").request("GET", "/x", max_bytes=MOST)

    def test_an_answer_larger_than_can_be_right_is_not_read(self, peer: Any, quick: RetryPolicy) -> None:
        """However large it says that it is: nothing is allocated for it."""
        peer.acts = [peer.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999\r\n\r\n")]
        with pytest.raises(WireError, match="999999999999999"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)
        assert len(peer.asked) == 1

    def test_endless_chunks_end(self, peer: Any, quick: RetryPolicy) -> None:
        """A body without a length is bounded too."""
        peer.acts = [peer.raw(chunked(*[bytes(1 << 16)] * 20))]
        with pytest.raises(WireError, match="more than"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)

    def test_neither_length_nor_chunks_is_refused(self, peer: Any, quick: RetryPolicy) -> None:
        """The end of such a body and a cut look alike."""
        peer.acts = [peer.raw(b"HTTP/1.1 200 OK\r\n\r\nhello")]
        with pytest.raises(WireError, match="neither a length nor chunks"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)

    def test_a_compressed_answer_is_refused(self, peer: Any, quick: RetryPolicy) -> None:
        """It was not asked for, and its bytes are no arrays."""
        peer.acts = [peer.whole(200, BODY, Content_Encoding="gzip")]
        with pytest.raises(WireError, match="compressed"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)

    @pytest.mark.parametrize(
        "answer", [b"", b"\r\n\r\n", b"garbage\r\n", b"HTTP/1.1 abc\r\n", b"HTTP/1.1 200 OK\r\n" + b"a" * 99_999]
    )
    def test_what_is_no_http_is_no_answer(self, peer: Any, quick: RetryPolicy, answer: bytes) -> None:
        """Another protocol on that port is an unreachable server."""
        peer.acts = [peer.raw(answer)]
        with pytest.raises(ServerUnreachableError, match="no complete reply"):
            transport(peer, quick).request("GET", "/x", max_bytes=MOST)


def _echo(connection: socket.socket, asked: Any) -> bool:
    answer = f"{asked.connection} ".encode() + asked.body
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
    return True


def _ask_in_child(link: HttpTransport, answers: SimpleQueue[tuple[int, bytes]]) -> None:
    reply = link.request("POST", "/x", body=b"child", max_bytes=MOST)
    answers.put((os.getpid(), bytes(reply.body)))


class TestSharing:
    def test_threads_never_get_each_others_answers(self, peer: Any, quick: RetryPolicy) -> None:
        """Each connection carries one request at a time."""
        peer.acts = [_echo]
        link = transport(peer, quick)

        def ask(number: int) -> bool:
            body = str(number).encode()
            return bytes(link.request("POST", "/x", body=body, max_bytes=MOST).body).split(b" ")[1] == body

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(400)))

    def test_a_forked_child_opens_connections_of_its_own(self, peer: Any, quick: RetryPolicy) -> None:
        """Two processes on one socket would read each other's answers."""
        peer.acts = [_echo]
        link = transport(peer, quick)
        link.request("POST", "/x", body=b"parent", max_bytes=MOST)
        context = multiprocessing.get_context("fork")
        answers: SimpleQueue[tuple[int, bytes]] = context.SimpleQueue()
        child = context.Process(target=_ask_in_child, args=(link, answers))
        child.start()
        pid, answer = answers.get()
        child.join()
        assert pid != os.getpid()
        assert answer == b"2 child"
        assert link.request("POST", "/x", body=b"parent", max_bytes=MOST).body == b"1 parent"

    def test_it_pickles_without_its_connections(self, peer: Any, quick: RetryPolicy) -> None:
        """A spawned worker gets the address and the token, and connects by itself."""
        peer.acts = [_echo]
        link = transport(peer, quick, token="s3cret")
        link.request("POST", "/x", body=b"a", max_bytes=MOST)
        copy = pickle.loads(pickle.dumps(link))
        assert copy.request("POST", "/x", body=b"b", max_bytes=MOST).body == b"2 b"
        assert peer.asked[1].headers["authorization"] == "Bearer s3cret"

    def test_closing_ends_connections_and_not_the_transport(self, peer: Any, quick: RetryPolicy) -> None:
        """A later request connects again."""
        peer.acts = [_echo]
        link = transport(peer, quick)
        link.request("POST", "/x", body=b"a", max_bytes=MOST)
        link.close()
        assert link.request("POST", "/x", body=b"b", max_bytes=MOST).body == b"2 b"

    def test_an_interrupted_request_leaves_no_connection_behind(self, peer: Any, quick: RetryPolicy) -> None:
        """After Ctrl-C half an answer is still on its way there."""
        peer.acts = [peer.stall, _echo]
        link = transport(peer, quick)

        def interrupt_once_asked() -> None:
            while not peer.asked:
                time.sleep(0.01)
            time.sleep(0.1)
            os.kill(os.getpid(), 2)

        interrupt = threading.Thread(target=interrupt_once_asked)
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            link.request("POST", "/x", body=b"a", max_bytes=MOST)
        interrupt.join()
        assert link.request("POST", "/x", body=b"b", max_bytes=MOST).body == b"2 b"
