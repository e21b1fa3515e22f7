"""What docs/parameters.md says of the parameters is what the package does."""

from environments import ROOT

from mergekit_fim.config.parameters import PARAMETERS


def shown(value) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# The defaults that are no value, in words.
NO_VALUE = {
    "fisher": "none",
    "alpha_mean": "none",
    "alpha_other": "the layers' mean",
    "density": "0.2 or 0.4",
    "alpha": "from the pre-pass",
}


def others(parameter) -> str:
    """The methods that have another default, in brackets."""
    methods: dict[str, list[str]] = {}
    for method in parameter.methods:
        if (own := shown(parameter.default_for(method))) != shown(parameter.default):
            methods.setdefault(own, []).append(f"`{method}`")
    listed = [f"{', '.join(its)}: {own}" for own, its in methods.items()]
    return f" ({'; '.join(listed)})" if listed else ""


def test_the_parameter_table():
    lines = (ROOT / "docs/parameters.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PARAMETERS}
    assert list(table) == list(PARAMETERS)
    assert {name for name, parameter in PARAMETERS.items() if parameter.default is None} == set(NO_VALUE)
    for name, (default, source, meaning) in table.items():
        parameter = PARAMETERS[name]
        assert meaning == f"{parameter.meaning}; {parameter.expected}", name
        if parameter.default is None:
            assert default == NO_VALUE[name] + others(parameter), name
        else:
            assert default == shown(parameter.default) + others(parameter), name
        assert source == parameter.source, name
