"""A table from end to end: fit, new rows, conditional rows, and a comparison with held-out rows.

    python examples/table.py

scikit-learn's wine table: 178 rows of 13 measurements and a class. Such small tables are easily memorised, so check
`copy_auc` last: 0.5 means that new rows are no nearer to training rows than to held-out ones.
"""

from pathlib import Path

from sklearn.datasets import load_wine

import sfumato


def main(
    out: Path = Path("runs/wine"), budget: str | None = "60s", steps: int | None = None, overrides=(), **settings
) -> dict:
    """Write the table, train on it, generate as many rows, evaluate them; returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    source = out / "wine.csv"
    wine = load_wine(as_frame=True)
    table = wine.frame.assign(target=wine.target.map(dict(enumerate(wine.target_names)))).rename(
        columns={"target": "kind"}
    )
    table.to_csv(source, index=False)

    run = out / "run"
    settings |= {"budget": None if steps else budget, "steps": steps, "overwrite": run.exists()}
    model = sfumato.fit(str(source), out=run, overrides=["data.held_out=0.2", *overrides], **settings)
    names = [column["name"] for column in model.config.spec["columns"]]
    print(f"{len(names)} columns -> latents of {model.codec.latent_size} numbers with zero mean and unit variance")

    model.generate(len(table), out=out / "made.csv", sheet=out / "made.png", overwrite=True)
    model.generate(20, out=out / "strong.csv", where=["alcohol>=13"], overwrite=True)
    report = sfumato.evaluate(run, source, n=len(table))
    for name in ("c2st", "shape_error", "trend_error", "copy_auc"):
        print(f"{name:12} {report[name]:.3f}  (held-out rows: {report[name + '_floor']:.3f})")
    return report


if __name__ == "__main__":
    main()
