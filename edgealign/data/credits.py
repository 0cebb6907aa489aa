"""Who made the real data that presets read, and under which licence: for model cards.

Keyed by the folder below `--data`. Weights trained on a folder that is not here cannot be packaged: add its line.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.errors import InputError
from edgealign.registry import suggest


@dataclass(frozen=True)
class Credit:
    """What a folder holds, its licence, and whom to name."""

    what: str
    licence: str
    credit: str


CREDITS: dict[str, Credit] = {
    "anthropic_evals_persona": Credit("statements that a persona agrees with", "CC-BY-4.0", "Perez et al. 2022"),
    "classic_books": Credit("children's books and simple classics", "public domain", "their authors"),
    "disfl_qa": Credit("questions with and without slips of the tongue", "CC-BY-4.0", "Gupta et al. 2021"),
    "dolly_noctx": Credit("instructions and answers", "CC-BY-SA-3.0", "Databricks 2023"),
    "enwiki_leads": Credit("first paragraphs of articles", "CC-BY-SA-3.0", "Wikipedia contributors"),
    "fairytaleqa": Credit("fairy tales, and questions about them", "Apache-2.0", "Xu et al. 2022"),
    "gsm8k": Credit("arithmetic in words", "MIT", "Cobbe et al. 2021"),
    "hh_rlhf": Credit("pairs of answers, one preferred", "MIT", "Bai et al. 2022"),
    "onestop": Credit("news at three reading levels", "CC-BY-SA-4.0", "Vajjala & Lucic 2018"),
    "p3_permissive": Credit("tasks as prompts", "Apache-2.0", "Wang et al. 2022; Sanh et al. 2021"),
    "sgd": Credit("errands in dialogue", "CC-BY-SA-4.0", "Rastogi et al. 2020"),
    "storybooks_en": Credit(
        "stories for children", "CC-BY-4.0", "African Storybook and Pratham Books, and the authors of the stories"
    ),
    "synthetic_persona_chat": Credit("small talk of two personas", "CC-BY-4.0", "Jandaghi et al. 2023"),
    "taskmaster_reward": Credit("answers with a thumb up or down", "CC-BY-4.0", "Byrne et al.; Sidahmed et al. 2024"),
    "tm4_coffee": Credit("coffee orders in dialogue", "CC-BY-4.0", "Taskmaster, Byrne et al."),
    "topical_chat": Credit("talk about everyday topics", "CDLA-Sharing-1.0", "Gopalakrishnan et al. 2019"),
    "ukpconvarg1": Credit("pairs of arguments, one more convincing", "CC-BY-4.0", "Habernal & Gurevych 2016"),
    "ultrafeedback_1k": Credit("pairs of answers, judged by a model", "MIT", "Cui et al. 2023"),
}


def credit_of(path: str) -> tuple[str, Credit]:
    """The folder that a path below `--data` lies in, and its credit.

    Raises:
        InputError: nobody wrote down who made it.
    """
    folder = path.split("/", 1)[0]
    if folder not in CREDITS:
        raise InputError(
            folder, f"has no licence and no credit{suggest(folder, CREDITS)}", "add it to edgealign/data/credits.py"
        )
    return folder, CREDITS[folder]
