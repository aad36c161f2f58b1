"""An application that is served in a thread, for tests."""

import socket
import threading
import time
from contextlib import contextmanager


@contextmanager
def served(app):
    """Serve an application on a free port of this machine; yield the port."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
