"""A budget of tokens: the learning rate follows the share that is spent, and the step that spends the rest is the last."""

from __future__ import annotations

from typing import Any

from paft.train import budget


class Spending:
    """Mix in before a TRL trainer that counts the ``tokens`` it trains on, over all processes, and calls `spend`."""

    max_tokens: int | None = None
    tokens: int
    state: Any
    args: Any

    def spend(self, max_tokens: int | None, steps: int) -> None:
        """Train on ``max_tokens``, which takes fewer than ``steps`` steps; None: the budget is another."""
        self.max_tokens, self.bound = max_tokens, steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.max_tokens and self.lr_scheduler is None:  # type: ignore[has-type]
            self.lr_scheduler = budget.scheduler(self.args, optimizer or self.optimizer, [self.bound], self._time)  # type: ignore[attr-defined]
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _time(self, step: int) -> float:
        """The time of the learning rate, in steps of T; that of T itself is the end, however many tokens are spent now."""
        assert self.max_tokens
        return self.bound * (min(1.0, self.tokens / self.max_tokens) if step < self.bound else 1.0)

    def close(self) -> None:
        """Within a step that has its tokens counted: make it the last for all who do something in the last."""
        if self.max_tokens and self.tokens >= self.max_tokens:
            self.state.max_steps = self.state.global_step + 1
