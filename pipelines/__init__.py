"""Wiring: components become pipelines. Installed as `moeprune.pipelines`, hence relative imports among its modules."""
