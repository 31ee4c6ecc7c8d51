"""Where things run: the Ray session, storage paths, cluster manifests. Imports nothing of ours."""
