//! What the operating system says where the driver says something else.

/// Whether this is WSL. Its driver says that memory may be made for RDMA, makes it and maps it, and then refuses every access
/// (`CUDA_ERROR_UNKNOWN` of `cuMemSetAccess`, pytorch/pytorch#192330); nothing there could use it.
pub(crate) fn runs_under_windows() -> bool {
    std::fs::read_to_string("/proc/version").is_ok_and(|version| is_wsl(&version))
}

/// Whether a kernel that calls itself so (`/proc/version`) is Windows' Linux.
#[must_use]
pub fn is_wsl(version: &str) -> bool {
    version.to_ascii_lowercase().contains("microsoft")
}

#[cfg(test)]
mod tests {
    use super::is_wsl;

    /// Every allocation of a region failed there.
    #[test]
    fn memory_is_not_made_for_rdma_under_windows() {
        assert!(is_wsl("Linux version 6.6.87-microsoft-standard-WSL2 (root@...)"));
        assert!(is_wsl("Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com)"));
        assert!(!is_wsl("Linux version 6.8.0-45-generic (buildd@lcy02-amd64-115)"));
    }
}
