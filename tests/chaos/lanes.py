"""The lanes of tests/src/chaos that go through Python's tritonclient.

Reads one line of JSON from stdin: when the run began, the coordinators' addresses, and the lanes. Writes one line of JSON for
each thing that happens: a pass opens, a request is sent, a response comes, a pass ends. Ends with the next line on stdin, after
the last answers. A lane that `resumes` keeps its stream when a coordinator dies, by what proto/PROTOCOL.md asks of a client.
"""

import json
import queue
import sys
import threading
import time
import uuid

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

# How long one address is given for a call.
TRY_S = 2.0
# How long a request is asked again before it is given up.
PATIENCE_S = 60.0
# How long a stream with open requests may be silent before its caller gives it up.
SILENCE_S = 20.0
# Before the same request is asked again where nobody else is left to ask.
PAUSE_S = 0.1

# Connections are a pass's own, and notice soon when nobody is there any more; PROTOCOL.md recommends these figures, and says why.
CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 400),
    ("grpc.keepalive_timeout_ms", 600),
    ("grpc.http2.ping_timeout_ms", 600),
    ("grpc.http2.max_pings_without_data", 1_000_000),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Report:
    def __init__(self, begun_unix_us):
        # A clock that doesn't jump, set by one that is everybody's.
        self.offset_us = time.time_ns() // 1000 - begun_unix_us - time.monotonic_ns() // 1000
        self.lock = threading.Lock()

    def now_us(self):
        return time.monotonic_ns() // 1000 + self.offset_us

    def say(self, lane, what, **more):
        line = json.dumps({"lane": lane, "what": what, "at_us": self.now_us(), **more})
        with self.lock:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


class Lane:
    def __init__(self, number, spec, addresses, report, over):
        self.number = number
        self.spec = spec
        self.addresses = addresses
        self.address = spec["first_address"]
        self.report = report
        self.over = over
        self.inputs = [bytes.fromhex(text) for text in spec["inputs"]]
        self.interval_s = spec["interval_us"] / 1e6
        self.due = time.monotonic()
        self.sequence = 0

    def say(self, what, **more):
        self.report.say(self.number, what, **more)

    def tick(self):
        """Waits for the next moment of the pace; those that were missed are left out."""
        now = time.monotonic()
        while self.due < now:
            self.due += self.interval_s
        self.over.wait(self.due - now)
        return not self.over.is_set()

    def open(self, first):
        address = self.addresses[self.address % len(self.addresses)]
        self.say("open", address=address, first=first)
        return triton.InferenceServerClient(address, channel_args=CHANNEL)

    def input(self, place):
        tensor = triton.InferInput(self.spec["input"], self.spec["shape"], self.spec["datatype"])
        dtype = {"FP32": np.float32, "INT64": np.int64}[self.spec["datatype"]]
        tensor.set_data_from_numpy(np.frombuffer(self.inputs[place], dtype).reshape(self.spec["shape"]))
        return [tensor]

    def got(self, result, number=None):
        response = result.get_response()
        output = response.raw_output_contents[0] if response.raw_output_contents else b""
        self.say("got", id=response.id if number is None else str(number), output=output.hex())

    def ended(self, error, gave_up=False):
        """Says how a pass broke, and goes on to the next address."""
        self.say("broke", code=str(error.status()), message=str(error.message()), gave_up=gave_up)
        self.address += 1

    def run(self):
        if self.spec["kind"] == "unary":
            self.calls()
        else:
            self.streams()

    def calls(self):
        place, client, tries, begun = 0, None, 0, time.monotonic()
        while tries or self.tick():
            if client is None:
                client = self.open(place)
            else:
                self.say("open", address=self.addresses[self.address % len(self.addresses)], first=place)
            begun = begun if tries else time.monotonic()
            self.say("sent")
            try:
                self.got(client.infer(self.spec["model"], self.input(place), request_id="0", client_timeout=TRY_S))
            except InferenceServerException as error:
                client.close()
                client = None
                gave_up = time.monotonic() - begun > PATIENCE_S
                self.ended(error, gave_up)
                tries = 0 if gave_up else tries + 1
                if tries % len(self.addresses) == 0:
                    time.sleep(PAUSE_S)
                continue
            self.say("end")
            tries, place = 0, (place + 1) % len(self.inputs)

    def streams(self):
        first = 0
        while not self.over.is_set():
            answered, broken = self.stream(first)
            first = (first + answered) % len(self.inputs) if broken and not self.spec["is_sequence"] else 0
            if broken and not answered:
                time.sleep(PAUSE_S)

    def stream(self, first):
        """One stream, the script from `first` to its end: how many requests had all their responses, and whether it broke."""
        client = self.open(first)
        self.sequence = time.monotonic_ns()
        changed, got, errors = threading.Condition(), {}, []

        def answer(result, error):
            with changed:
                if error is None:
                    self.got(result)
                    ordinal = result.get_response().id
                    got[ordinal] = got.get(ordinal, 0) + 1
                elif not errors:
                    errors.append(error)
                changed.notify()

        def whole():
            return sum(count >= self.spec["parts"] for count in got.values())

        client.start_stream(answer)
        sent = 0
        for place in range(first, len(self.inputs)):
            is_last = not self.tick() or place + 1 == len(self.inputs)
            if errors:
                break
            self.say("sent")
            bounds = {}
            if self.spec["is_sequence"]:
                bounds = dict(sequence_id=self.sequence, sequence_start=sent == 0, sequence_end=is_last)
            try:
                client.async_stream_infer(self.spec["model"], self.input(place), request_id=str(sent), **bounds)
            except InferenceServerException as error:
                # The stream has ended; the callback has said how.
                with changed:
                    errors or errors.append(error)
                sent += 1
                break
            sent += 1
            if is_last:
                break
        with changed:
            while not errors and whole() < sent:
                before = sum(got.values())
                if not changed.wait(SILENCE_S) and sum(got.values()) == before and not errors:
                    errors.append(InferenceServerException(f"nothing came for {SILENCE_S} s", "silent"))
        client.stop_stream(cancel_requests=bool(errors))
        client.close()
        # What came late belongs to the pass, too, so it ends only now.
        if errors:
            self.ended(errors[0])
        else:
            self.say("end")
        return whole(), bool(errors)


class Asked:
    """A request of a stream that resumes."""

    def __init__(self, number, place, starts, ends):
        self.number, self.place, self.starts, self.ends = number, place, starts, ends
        self.version = ""
        self.received = 0
        self.is_answered = False


class ResumedLane(Lane):
    def connect(self, again=False):
        """The next connection: everything that is unanswered goes out again; with `again`, all of the sequence."""
        self.attempt += 1
        self.client.stop_stream(cancel_requests=True)
        self.client.close()
        self.address += 1
        self.begin()
        ack = 0
        for asked in self.asked:
            if again or not asked.is_answered:
                self.send(asked, ack if again else self.ack, self.version if again else asked.version)
            # A request that is sent again from the first on has what came before it.
            ack = asked.number if asked.is_answered else ack

    def begin(self):
        attempt, events = self.attempt, self.events
        self.client = triton.InferenceServerClient(self.addresses[self.address % len(self.addresses)], channel_args=CHANNEL)
        # An error then ends the stream with its status, which is all that tritonclient passes on.
        self.client.start_stream(lambda result, error: events.put((attempt, result, error)), headers={"triton_grpc_error": "true"})

    def send(self, asked, ack, version):
        about = {"cresset_stream_id": self.stream_id, "cresset_attempt": self.attempt, "cresset_ack": asked.received}
        bounds = {}
        if self.spec["is_sequence"]:
            about.update(cresset_ordinal=asked.number, cresset_ack=ack)
            bounds = dict(sequence_id=self.sequence, sequence_start=asked.starts, sequence_end=asked.ends)
        try:
            self.client.async_stream_infer(
                self.spec["model"],
                self.input(asked.place),
                model_version=version,
                request_id=str(asked.number),
                enable_empty_final_response=True,
                parameters=about,
                **bounds,
            )
        except InferenceServerException:
            # The stream has ended, and says so itself.
            pass

    def hear(self, result, error):
        """Takes what came; what can't be helped comes back."""
        if error is not None:
            if time.monotonic() - self.good > PATIENCE_S:
                return error
            if error.status() == "StatusCode.ABORTED" and self.again < self.AGAIN_MAX:
                # Nobody holds the sequence but this client.
                self.again += 1
                self.connect(again=True)
            elif error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED"):
                # One round of addresses without a pause.
                self.failures += 1
                if self.failures % len(self.addresses) == 0:
                    time.sleep(PAUSE_S)
                self.connect()
            else:
                return error
            return None
        self.failures, self.good = 0, time.monotonic()
        response = result.get_response()
        asked = self.asked[int(response.id) - 1]
        if asked.is_answered:
            return None
        is_final = response.parameters["triton_final_response"].bool_param
        if response.outputs:
            asked.received += 1
            self.version = response.model_version
            asked.version = "" if self.spec["is_sequence"] else response.model_version
            self.got(result, asked.number - 1)
        if is_final:
            asked.is_answered = True
            self.ack, self.again = max(self.ack, asked.number), 0
        return None

    # How often a sequence is sent again from its first request without any answer in between.
    AGAIN_MAX = 5

    def stream(self, first):
        self.say("open", address=None, first=first)
        self.sequence = time.monotonic_ns()
        self.stream_id, self.attempt, self.ack, self.again, self.version = uuid.uuid4().hex, 1, 0, 0, ""
        self.asked, self.events, self.failures, self.good = [], queue.Queue(), 0, time.monotonic()
        self.begin()
        is_last, error = False, None
        while error is None and not (is_last and all(asked.is_answered for asked in self.asked)):
            now = time.monotonic()
            if not is_last and (now >= self.due or self.over.is_set()):
                while self.due <= now:
                    self.due += self.interval_s
                number = len(self.asked) + 1
                is_last = first + number == len(self.inputs) or self.over.is_set()
                asked = Asked(number, first + number - 1, number == 1, is_last)
                self.say("sent")
                self.asked.append(asked)
                self.send(asked, self.ack, "")
                continue
            try:
                attempt, result, error = self.events.get(timeout=SILENCE_S if is_last else self.due - now)
            except queue.Empty:
                if is_last:
                    error = InferenceServerException(f"nothing came for {SILENCE_S} s", "silent")
                continue
            # What an older connection says doesn't count.
            error = self.hear(result, error) if attempt == self.attempt else None
        self.client.stop_stream(cancel_requests=error is not None)
        self.client.close()
        if error is not None:
            self.ended(error)
        else:
            self.say("end")
        return sum(asked.is_answered for asked in self.asked), error is not None


def main():
    spec = json.loads(sys.stdin.readline())
    report, over = Report(spec["begun_unix_us"]), threading.Event()
    lanes = []
    for number, lane in enumerate(spec["lanes"]):
        kind = ResumedLane if lane["resumes"] else Lane
        lanes.append(kind(number, lane, spec["addresses"], report, over))
    threads = [threading.Thread(target=lane.run) for lane in lanes]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    over.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
