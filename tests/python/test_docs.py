"""The examples of docs/python.md, as they stand there."""

import doctest
import re

import pytest
from conftest import MODEL, ROOT, available

TEXT = (ROOT / "docs" / "python.md").read_text()


def test_examples():
    skipped, text = [], TEXT
    for needs, block in re.findall(r"<!-- needs: ([\w, ]+) -->\n```python\n(.*?)```", TEXT, re.DOTALL):
        if not all(available(name) for name in needs.split(", ")):
            text = text.replace(block, "")
            skipped.append(needs)
    text = text.replace("```", "\n")
    test = doctest.DocTestParser().get_doctest(text, {"MODEL": MODEL}, "python.md", "docs/python.md", 0)
    report = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
    assert result.attempted > 10
    if skipped:
        pytest.skip(f"all passed but those that need {', '.join(skipped)}")
