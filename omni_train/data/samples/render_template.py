"""Program that renders chat templates of others: a process of its own, as a template may take any time and memory.

Reads ``{"template": …, "asked": [variables, …]}`` as JSON and writes the list of what was rendered.
"""

import json
import resource
import sys

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 10
MEMORY = 1 << 30  # bytes


def render(template: str, variables: dict) -> str:
    """Text that a template writes, or the error in its place."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(variables)
    except Exception as error:  # a template may do anything
        return f"not rendered: {error!r}"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    task = json.load(sys.stdin)
    json.dump([render(task["template"], variables) for variables in task["asked"]], sys.stdout)
