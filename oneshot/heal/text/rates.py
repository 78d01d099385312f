"""Rates: the learning rate that the first steps on a text show to be the best, where the user gives none.

Some rates are tried, from high to low. From the same start each does the same first steps (warm-up, then constant), and
the held-out loss says what it gained. That ends with the first rate that gains less than a higher one; the best one is
what healing begins with, from the start again. A short text is not worth it: there, the first of the rates is taken.
"""

import gc
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import Course

STEPS, LEAST = 16, 8  # of each rate, at most and at least
SHARE = 20  # of the steps of a text, one in so many may be done at each rate
WARM = 4  # steps until the rate is reached


def best(course: "Course") -> float:
    """The rate to begin with. What is tried goes into `course.tried`, and is not tried again by a run that resumes."""
    steps = min(STEPS, len(course.lesson.text.train) // course.windows // SHARE)
    for rate in course.given[len(course.tried):] if steps >= LEAST and len(course.given) > 1 else ():
        if over(course.tried, course.before):
            break
        with course.counting():
            course.tried.append([rate, loss_after(course, rate, steps)])
        course.note()
    return min(course.tried, key=lambda row: finite(row[1]))[0] if course.tried else course.given[0]


def loss_after(course: "Course", rate: float, steps: int) -> float:
    """The held-out loss after the first steps from the start, at a rate."""
    from . import Attempt

    course.set(None)
    trainer = course.trainer(Attempt(rate, 0), steps)
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    del trainer
    gc.collect()  # it refers to itself, and Adam's averages must go before the next ones come
    return found


def schedule(steps: int) -> dict:
    """Trainer's arguments for the first steps."""
    return {"max_steps": steps, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": WARM,
            "eval_strategy": "no", "save_strategy": "no"}


def over(tried: list[list[float]], before: float) -> bool:
    """Whether lower rates need not be tried: one gained, and the next one less. tried: [rate, held-out loss] each."""
    losses = [finite(loss) for _, loss in tried]
    return len(losses) > 1 and losses[-1] >= min(losses[:-1]) < before


def finite(loss: float) -> float:
    """A loss, or infinity where it is no number."""
    return loss if math.isfinite(loss) else math.inf
