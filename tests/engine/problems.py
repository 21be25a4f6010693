"""Requests on tiny models, encoded for the engines and for the naive twins."""

from __future__ import annotations

from reference.target_vector import Request
from tiny import tiny_tokenizer

from fastedit.engine.problem import Problem, TokenOptions, build_problem, key_rows
from fastedit.request import EditRequest

TEMPLATES = ("{}", "Marie Curie worked in London. {}", "The field of {}")
GROUPS = (1, 2)

REQUESTS = (
    EditRequest(
        id="1",
        prompt="The {} is located in the city of",
        subject="Eiffel Tower",
        target_new="Rome and London",
    ),
    EditRequest(
        id="2", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"
    ),
    EditRequest(id="3", prompt="{} plays the sport of", subject="LeBron James", target_new="physics"),
    EditRequest(id="4", prompt="{} plays", subject="Toko Yasuda", target_new="chemistry"),
    EditRequest(id="5", prompt="Here comes {}", subject="Marie Curie", target_new="of Rome"),
)


def problems(
    requests: tuple[EditRequest, ...] = REQUESTS, options: TokenOptions | None = None
) -> list[Problem]:
    options = TokenOptions() if options is None else options
    return [build_problem(tiny_tokenizer(), request, TEMPLATES, options) for request in requests]


def naive(request: EditRequest) -> Request:
    """The same request as the naive twins take it."""
    tokenizer = tiny_tokenizer()
    rows = key_rows(tokenizer, request, TEMPLATES, TokenOptions())
    problem = build_problem(tokenizer, request, TEMPLATES, TokenOptions())
    return Request(
        rows=[list(row.ids) for row in rows],
        lookup=[row.lookup for row in rows],
        target=list(problem.target),
        kl_row=list(problem.essence.ids),
        kl_lookup=problem.essence.lookup,
        groups=GROUPS,
    )
