"""The programs of a deployment on real machines: a site's node, the server, a trial of both."""
