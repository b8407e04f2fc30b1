//! `forkd bench branch`: all rows are there, their numbers agree with each other, and nothing is left.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::fixture::Suite;
use crate::runner::{Test, tests};

pub const WITHOUT_GUEST: &[Test] = tests!["bench":
    wrong_sweeps_are_one_line 30,
];

pub const TESTS: &[Test] = tests!["bench":
    branches_are_measured_in_all_modes 600,
];

fn wrong_sweeps_are_one_line(suite: &Suite) -> Result<()> {
    for (args, status, word) in [
        (["--mem", "256,some"], 2, "some"),
        (["--mem", "64"], 2, "64"),
        (["--rates", "quick"], 2, "quick"),
        (["--modes", "forks"], 2, "forks"),
        (["--depths", "8..0"], 2, "8..0"),
        (["--rounds", "0"], 2, "0"),
        (["--ring", "5000"], 1, "5000"),
    ] {
        let said = suite.forkd(["bench", "branch"].iter().chain(&args)).output()?;
        said.status_is(status)?.one_line(&[word])?;
    }
    Ok(())
}

fn number(row: &Value, field: &str, of: &str) -> Result<f64> {
    row[field][of].as_f64().with_context(|| format!("{field}.{of} of {row}"))
}

fn branches_are_measured_in_all_modes(suite: &Suite) -> Result<()> {
    let file = suite.scratch("bench")?.join("branch.json");
    let saved = file.to_string_lossy().into_owned();
    let sweep =
        ["--mem", "256", "--ring", "32", "--writers", "2", "--rates", "idle,max", "--rounds", "2"];
    let rest = ["--depths", "0..1", "--save", &saved, "--json"];
    let run = suite.forkd(["bench", "branch"].iter().chain(&sweep).chain(&rest));
    let report: Value = run.ok()?.json()?;
    ensure!(report["failures"] == serde_json::json!([]), "{report}");
    let cells = report["cells"].as_array().context("cells")?;
    let found: Vec<_> = cells.iter().map(|c| (c["mode"].as_str(), c["rate"].as_str())).collect();
    let expected = [
        ("fork", "idle"),
        ("fork", "max"),
        ("diff", "30 MB each"),
        ("diff", "idle"),
        ("diff", "max"),
        ("live", "idle"),
        ("live", "max"),
        ("full", "idle"),
        ("full", "max"),
    ];
    ensure!(found == expected.map(|(mode, rate)| (Some(mode), Some(rate))), "{found:?}");
    for cell in cells {
        check_cell(cell)?;
    }
    let size = |n: usize| number(&cells[n], "disk_mib", "p50");
    // The rings' 32 MiB are in each full snapshot; of a diff what was written is, here 30 MB.
    ensure!(size(7)? > 60.0 && size(2)? > 28.0 && size(2)? < 60.0, "{} and {}", size(7)?, size(2)?);
    let loads = report["loads"].as_array().context("loads")?;
    ensure!(loads.len() == 2 && loads[1]["depth"] == 1, "{loads:?}");
    for load in loads {
        let (zygote, running) =
            (number(load, "zygote_ms", "p50")?, number(load, "running_ms", "p50")?);
        ensure!(0.0 < zygote && zygote < running, "{load}");
    }
    ensure!(report["per_link_ms"].is_f64(), "{report}");
    let kept: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    ensure!(kept == report, "what was saved is what was printed");
    for list in [["ls", "--json"].as_slice(), &["snapshot", "ls", "--json"]] {
        let text = suite.forkd(list).ok()?.text();
        ensure!(!text.contains("bench-"), "left: {text}");
    }
    Ok(())
}

fn check_cell(cell: &Value) -> Result<()> {
    let mode = cell["mode"].as_str().context("mode")?;
    let (pause, count) = (number(cell, "pause_ms", "p50")?, cell["pause_ms"]["count"].as_u64());
    ensure!(count == Some(2) && pause > 0.0, "{cell}");
    let parts = number(cell, "quiesce_ms", "min")? + number(cell, "save_ms", "min")?;
    ensure!(parts <= number(cell, "pause_ms", "max")?, "{cell}");
    // On a busy host the VMM's pause may be longer than the guest's; none at all is seen if it is below 0.1 ms.
    let seen = cell["gap_ms"]["count"].as_u64().unwrap_or_default();
    ensure!(seen + cell["unseen"].as_u64().context("unseen")? == 2, "{cell}");
    ensure!(mode != "full" || number(cell, "gap_ms", "max")? > pause / 2.0, "{cell}");
    let resident = |kind: &str| cell["resident"][kind].as_u64().unwrap_or_default();
    ensure!(resident("huge") + resident("small") > 32 << 20, "{cell}");
    if mode != "full" {
        let (floor, ratio) =
            (number(cell, "floor_ms", "p50")?, cell["p50_to_floor"].as_f64().context("ratio")?);
        ensure!(floor > 0.0 && (ratio - pause / floor).abs() < 1e-6, "{cell}");
    }
    let written = cell["written_mb_s"].as_f64().context("written_mb_s")?;
    ensure!((cell["rate"] == "max") == (written > 100.0), "{cell}");
    ensure!(number(cell, "ready_ms", "min")? > 0.0 && cell["lost"] == 0, "{cell}");
    Ok(())
}
