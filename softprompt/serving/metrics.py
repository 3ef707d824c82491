"""Metrics for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from softprompt.serving.service import Service

_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_EACH = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_WHOLE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What the server measures. All names begin with `softprompt_`.

    Args:
      service: its slots and its bank are read at each request for the metrics.

    Attributes:
      requests: by path, prompt and status.
      request_seconds: the time of a whole request, by path and prompt.
      first_token_seconds: the time from a request to its first token, by prompt.
      token_seconds: the time of each other token, by prompt.
      input_tokens, generated_tokens: by prompt.
      running: the requests that are being answered.
    """

    def __init__(self, service: Service):
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"softprompt_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, places: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"softprompt_{name}", text, labels, buckets=places, registry=registry)

        self.requests = counter("requests", "Answered requests.", "path", "prompt", "status")
        self.request_seconds = histogram(
            "request_seconds", "Time of a whole request.", _WHOLE, "path", "prompt"
        )
        self.first_token_seconds = histogram(
            "time_to_first_token_seconds", "Time to the first token.", _FIRST, "prompt"
        )
        self.token_seconds = histogram(
            "time_per_token_seconds", "Time of each token after the first.", _EACH, "prompt"
        )
        self.input_tokens = counter("input_tokens", "Tokens of inputs.", "prompt")
        self.generated_tokens = counter("generated_tokens", "Generated tokens.", "prompt")
        self.running = Gauge(
            "softprompt_requests_running", "Requests being answered.", registry=registry
        )
        limits, scheduler, bank = service.limits, service.scheduler, service.bank
        for name, text, value in (
            ("requests_waiting", "Answers that wait for a slot.", lambda: scheduler.waiting),
            ("slots_used", "Slots in use.", lambda: scheduler.occupied),
            ("slots", "All slots.", lambda: limits.slots),
            ("bank_tokens_used", "Tokens of all prefixes.", lambda: bank.used),
            ("bank_tokens", "Tokens that the bank can hold.", lambda: bank.capacity),
        ):
            gauge = Gauge(f"softprompt_{name}", text, registry=registry)
            gauge.set_function(value)

    def text(self) -> bytes:
        """Return all metrics in the format of Prometheus."""
        return generate_latest(self._registry)
