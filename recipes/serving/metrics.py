"""Count what the server does, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server, with a registry of their own."""

    def __init__(self):
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)  # memory and CPU time, on Linux
        self.calls = Counter("unigrf_calls", "Calls by path and status.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "unigrf_call_seconds", "Time of a call in seconds.", ["path"], buckets=SECONDS, registry=registry
        )
        self.requests = Counter("unigrf_requests", "Requests for a list.", registry=registry)
        self.batch_size = Histogram("unigrf_batch_size", "Requests of a batch.", buckets=SIZES, registry=registry)
        self.user_caches = Counter(
            "unigrf_user_caches", "Requests with a user, by whether a cache was kept.", ["result"], registry=registry
        )
        self.tokens = Counter(
            "unigrf_history_tokens", "Tokens of histories, by where they came from.", ["source"], registry=registry
        )
        self.reloads = Counter("unigrf_reloads", "Reloads by outcome.", ["outcome"], registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def count_tokens(self, spared: int, read: int) -> None:
        """Count the tokens of a batch: those of kept caches, and those that the model read."""
        self.tokens.labels("cache").inc(spared)
        self.tokens.labels("model").inc(read)

    def count_users(self, hits: int, misses: int) -> None:
        """Count the users of a batch with and without a kept cache."""
        self.user_caches.labels("hit").inc(hits)
        self.user_caches.labels("miss").inc(misses)

    def page(self) -> bytes:
        """Return the page of `/metrics`."""
        return generate_latest(self.registry)
