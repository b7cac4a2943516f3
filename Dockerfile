# The images of memballoon: `guest` runs inside a mock VM, `agent` on the host.
#
#   docker build --target guest --tag memballoon-guest .
#   docker build --target agent --tag memballoon-agent .
#
# Where there is no registry, tests/containers/base_image.py makes both base images from Debian
# packages: docs/containers.md.
ARG BASE_IMAGE=python:3.12-slim
# The same with whatever pip needs to find its wheels without a network.
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS guest-build
WORKDIR /src
RUN python3 -m venv /opt/memballoon
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY guest_driver guest_driver
# Without host_agent: so there is no `balloon`, and none of its dependencies.
RUN /opt/memballoon/bin/pip install --no-cache-dir --no-compile . \
    && rm -r /opt/memballoon/bin/pip* /opt/memballoon/lib/python3*/site-packages/pip* \
    && rm /opt/memballoon/bin/balloon \
    && find /opt/memballoon -name tests -type d -prune -exec rm -r {} +

FROM ${BUILD_IMAGE} AS agent-build
WORKDIR /src
RUN python3 -m venv /opt/memballoon
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY guest_driver guest_driver
COPY host_agent host_agent
RUN /opt/memballoon/bin/pip install --no-cache-dir --no-compile '.[host]' \
    && rm -r /opt/memballoon/bin/pip* /opt/memballoon/lib/python3*/site-packages/pip* \
    && find /opt/memballoon -name tests -type d -prune -exec rm -r {} + \
    && /opt/memballoon/bin/python -m compileall -q /opt/memballoon

FROM ${BASE_IMAGE} AS guest
COPY --from=guest-build /opt/memballoon /opt/memballoon
ENV PATH=/opt/memballoon/bin:${PATH}
# The root of a guest is read-only: what its driver imports is compiled now, as it runs it.
RUN python3 -OO -c 'import guest_driver.driver, guest_driver.workload' \
    && python3 -c 'import guest_driver.container, guest_driver.workload'
ENTRYPOINT ["balloon-guest", "run"]

# A guest with Redis, which some base images have already.
FROM guest AS guest-redis
RUN command -v redis-server >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends redis-server \
        && rm -rf /var/lib/apt/lists/*)

FROM ${BASE_IMAGE} AS agent
COPY --from=agent-build /opt/memballoon /opt/memballoon
ENV PATH=/opt/memballoon/bin:${PATH}
ENTRYPOINT ["balloon"]
CMD ["agent"]
