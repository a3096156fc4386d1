"""A client reads the KV cache from all ranks while they compute."""

from service import Service, check_reader


def run(pack, checks, arguments):
    pack.use_python_packages()
    with Service(pack, pack.path("models", "needle-20m"), ranks=arguments.ranks) as service:
        check_reader(pack, checks, service, 4096 if arguments.small else 262144, "host")
