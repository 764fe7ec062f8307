"""From a request to an artefact."""
