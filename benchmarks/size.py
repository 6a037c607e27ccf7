"""Size of the code: lines, statements, files and functions of everything but tests and benchmarks.

    python benchmarks/size.py [ROOT ...]        several checkouts side by side, as before and after

Settings are counted as declared more than once where a default that a `Config` class has stands in
a constructor's signature of the same component, too.
"""

import ast
import statistics
import sys
from pathlib import Path

LEFT_OUT = {"tests", "benchmarks", ".venv", "build", "dist", "runs", "data"}


def sources(root: Path) -> list[Path]:
    """Python files of a checkout, without tests, benchmarks and what commands made."""
    parts = {path: path.relative_to(root).parts for path in root.rglob("*.py")}
    return sorted(path for path, names in parts.items() if names[0] not in LEFT_OUT)


def measure(root: Path) -> dict[str, float | str]:
    """Figures of one checkout."""
    files = sources(root)
    lines, statements, functions = 0, 0, list[tuple[int, str]]()
    for path in files:
        text = path.read_text()
        lines += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            statements += isinstance(node, ast.stmt)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                functions.append((length, f"{path.relative_to(root)}:{node.name}"))
    longest = max(functions)
    return {
        "lines": lines,
        "statements": statements,
        "files": len(files),
        "functions": len(functions),
        "median function": statistics.median(length for length, _ in functions),
        "longest function": longest[0],
        "which": longest[1],
        "settings declared more than once": len(repeated_settings(files)),
    }


def repeated_settings(files: list[Path]) -> list[str]:
    """Defaults that stand both in a class of settings and in a constructor that it configures."""
    classes = [
        (path, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    declared: dict[str, dict[str, str]] = {}
    for _, node in classes:
        for inner in (node, *(x for x in node.body if isinstance(x, ast.ClassDef))):
            fields = {
                x.target.id: ast.unparse(x.value)
                for x in inner.body
                if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name) and x.value
            }
            bases = {ast.unparse(base).split(".")[-1] for base in inner.bases}
            if inner.name == "Config" or any("Settings" in base for base in bases):
                owner = node.name if inner is not node else inner.name.removesuffix("Settings")
                declared.setdefault(owner, {}).update(fields)
    repeated = []
    for path, node in classes:
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                args = method.args
                last = args.args[len(args.args) - len(args.defaults) :]
                defaults = [*zip(last, args.defaults, strict=True)]
                keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
                defaults += [(arg, value) for arg, value in keywords if value is not None]
                settings = declared.get(node.name, {})
                both = [a.arg for a, v in defaults if settings.get(a.arg) == ast.unparse(v)]
                repeated += [f"{path.name}:{node.name}.{name}" for name in sorted(both)]
    return repeated


def main() -> None:
    """One column a checkout."""
    roots = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1]]
    columns = [measure(root) for root in roots]
    for name in columns[0]:
        print(f"{name:34}" + "".join(f"{column[name]!s:>14}  " for column in columns))
    for root in roots:
        for text in repeated_settings(sources(root)):
            print(f"  {text}")


if __name__ == "__main__":
    main()
