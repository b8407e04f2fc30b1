//! `forkd bench-floor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples: forkd bench-floor")]
pub struct Args {}
impl Args {
    pub fn run(self) -> anyhow::Result<std::process::ExitCode> {
        Ok(std::process::ExitCode::SUCCESS)
    }
}
