"""HTTP servers that misbehave in a chosen way."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from flowalign.rewards import wire


@contextlib.contextmanager
def peer(*answers, alone=True):
    """Serve on a free port: each request gets the next of the answers, the last one again and again.

    An answer takes (handler, body) and either writes by itself and returns None, or returns a status and JSON. What is listed is always good.
    """
    calls = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            with lock:
                calls.append(body)
                answer = answers[min(len(calls), len(answers)) - 1]
            with contextlib.suppress(OSError):
                found = answer(self, body)
                if found is not None:
                    status, content = found
                    data = content if isinstance(content, bytes) else json.dumps(content).encode()
                    self.send_response(status)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

        def do_GET(self):
            data = json.dumps({"rewards": ["mean"], "scores_alone": ["mean"] if alone else []}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", calls
    finally:
        server.shutdown()
        server.server_close()


def right(handler, body):
    asked = wire.decode(body, wire.Limits())
    return 200, {"request_id": asked.request_id, "scores": {"mean": asked.images.double().mean((1, 2, 3)).tolist()}}


def lies(change):
    def answer(handler, body):
        status, content = right(handler, body)
        return status, change(content)

    return answer


def status(code, **headers):
    def answer(handler, body):
        handler.send_response(code)
        for name, value in {**headers, "content-length": "0"}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


def dies(handler, body):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def hangs(handler, body):
    time.sleep(3)


def drips(handler, body):
    handler.send_response(200)
    handler.send_header("content-length", "1000000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.03)


def drips_headers(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100):
        handler.wfile.write(b"x-%d: 1\r\n" % number)
        handler.wfile.flush()
        time.sleep(0.03)


def floods(handler, body):
    handler.send_response(200)
    handler.send_header("content-length", str(10**9))
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"x" * 10**6)
