"""What the server counts, for Prometheus at /metrics: numbers only, no texts and no user's name.

One registry per app, so that two apps in one process (tests) do not share their counts.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    def __init__(self) -> None:
        self.registry = kept = CollectorRegistry()
        self.requests = Counter("edgealign_requests", "By route and status", ["route", "status"], registry=kept)
        self.answers = Counter("edgealign_answers", "Answers by how they ended", ["finish"], registry=kept)
        self.prompt_tokens = Counter("edgealign_prompt_tokens", "Tokens of prompts that were answered", registry=kept)
        self.generated_tokens = Counter("edgealign_generated_tokens", "Tokens generated", registry=kept)
        self.refused = Counter("edgealign_refused", "Requests refused because the queue was full", registry=kept)
        self.crashes = Counter("edgealign_runtime_crashes", "Times the runtime's process died", registry=kept)
        self.feedback = Counter("edgealign_feedback", "Thumbs, edits and choices stored", ["kind"], registry=kept)
        self.waiting = Gauge("edgealign_waiting", "Requests in the queue", registry=kept)
        self.swaps = Histogram("edgealign_swap_seconds", "Switching to a user", buckets=SECONDS, registry=kept)
        self.ttft = Histogram("edgealign_ttft_seconds", "Prompt to first token", buckets=SECONDS, registry=kept)
        self.queued = Histogram("edgealign_queued_seconds", "Time in the queue", buckets=SECONDS, registry=kept)
