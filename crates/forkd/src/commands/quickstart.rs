//! `forkd quickstart`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples: forkd quickstart")]
pub struct Args {}
impl Args {
    pub fn run(self, _p: &crate::paths::Paths) -> anyhow::Result<std::process::ExitCode> {
        Ok(std::process::ExitCode::SUCCESS)
    }
}
