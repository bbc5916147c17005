"""A plain REQ/REP handler, written from the wire protocol alone: python plain_handler.py SERVER ID

It knows `add(a, b)`, `boom()` and `slow(seconds)`, and appends each call it begins to calls.log.
"""

import json
import sys
import time

import zmq

server, handler_id = sys.argv[1:3]
context = zmq.Context()
calls = context.socket(zmq.REP)
port = calls.bind_to_random_port("tcp://127.0.0.1")
ask = context.socket(zmq.REQ)
ask.connect(server)


def request(method, **params):
    ask.send(json.dumps({"method": method, "params": params}).encode())
    return json.loads(ask.recv())


methods = {
    "add": lambda a, b: a + b,
    "boom": lambda: 1 // 0,
    "slow": lambda seconds: time.sleep(seconds),
}
assert request("ping")["success"]
reply = request(
    "register",
    handler_id=handler_id,
    address=f"tcp://127.0.0.1:{port}",
    methods=list(methods),
)
print(reply["status"], flush=True)

while True:
    call = json.loads(calls.recv())
    if call["method"] == "ping":
        calls.send(b'{"success": true}')
        continue
    with open("calls.log", "a") as log:
        log.write(f"{call['execution_id']} {call['attempt']} {call['method']}\n")
    try:
        answer = {"success": True, "result": methods[call["method"]](**call["params"])}
    except Exception as error:
        answer = {"success": False, "error": f"{type(error).__name__}: {error}"}
    calls.send(json.dumps(answer).encode())
