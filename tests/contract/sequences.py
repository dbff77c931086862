"""The documented order of the hooks, as data: what a plugin that implements them all sees of one request."""

HEAD = ["request_received", "authenticate"]
CHECKED = [*HEAD, "prepare_request", "choose_targets", "check_request"]
LOOKED_UP = [*CHECKED, "lookup_response"]
ASKED = [*LOOKED_UP, "around_upstream"]
ATTEMPT = ["attempt_started", "attempt_finished"]
ERROR = ["render_error", "response_started", "request_finished"]

# (kind of reply, fate) → each hook of a plugin that has them all. `tap.end` is its tap's.
SEQUENCES = {
    ("whole", "success"): [*ASKED, *ATTEMPT, "transform_response", "response_started", "request_finished"],
    ("whole", "upstream error"): [*ASKED, *ATTEMPT, *ERROR],
    ("whole", "refused"): [*CHECKED, *ERROR],
    ("whole", "hit"): [*LOOKED_UP, "transform_response", "response_started", "request_finished"],
    ("whole", "disconnect"): [*ASKED, *ATTEMPT, "request_finished"],
    ("stream", "success"): [
        *[*ASKED, "attempt_started", "open_tap", "response_started"],
        *["tap.end", "attempt_finished", "request_finished"],
    ],
    ("stream", "upstream error"): [*ASKED, *ATTEMPT, *ERROR],
    ("stream", "refused"): [*CHECKED, *ERROR],
    ("stream", "hit"): [*LOOKED_UP, "open_tap", "response_started", "tap.end", "request_finished"],
    ("stream", "disconnect"): [
        *[*ASKED, "attempt_started", "open_tap", "response_started"],
        *["attempt_finished", "tap.end", "request_finished"],
    ],
    # no error is rendered once a stream has begun: the dialect's error event is sent
    ("stream", "cut"): [
        *[*ASKED, "attempt_started", "open_tap", "response_started"],
        *["attempt_finished", "tap.end", "request_finished"],
    ],
    # bytes that are passed on as they come: nothing to tap and nothing to transform
    ("binary", "success"): [*ASKED, "attempt_started", "response_started", "attempt_finished", "request_finished"],
    ("binary", "disconnect"): [*ASKED, "attempt_started", "response_started", "attempt_finished", "request_finished"],
    ("binary", "cut"): [*ASKED, "attempt_started", "response_started", "attempt_finished", "request_finished"],
}
# taken as a job: what is said of that is no model's answer
ACCEPTED = [*LOOKED_UP, "response_started", "request_finished"]

for fate in ("upstream error", "refused", "hit"):
    SEQUENCES["binary", fate] = SEQUENCES["whole", fate]

# the job at work: who asks is restored, everything else is as ever
RUNS = {case: [hook for hook in hooks if hook != "authenticate"] for case, hooks in SEQUENCES.items()}
