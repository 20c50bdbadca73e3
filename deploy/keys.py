"""The keys that machines and KubeRay's resources have, and what is not among them.

A tree maps each key to the tree of its value, or to None where anything goes. Lists are looked
through: the tree is that of their items.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

Tree = dict[str, Any]


def keys(words: str, **nested: Tree) -> Tree:
    """A tree of the keys in `words`, and of `nested` ones.

    >>> keys("a b", c=keys("d"))
    {'a': None, 'b': None, 'c': {'d': None}}
    """
    return {**dict.fromkeys(words.split()), **nested}


# EC2's RunInstances, without what Ray sets itself; SubnetIds is Ray's own.
EC2 = keys(
    "AdditionalInfo CapacityReservationSpecification CpuOptions CreditSpecification DisableApiStop "
    "DisableApiTermination EbsOptimized EnablePrimaryIpv6 EnclaveOptions HibernationOptions "
    "ImageId InstanceInitiatedShutdownBehavior InstanceType Ipv6AddressCount Ipv6Addresses "
    "KernelId KeyName LaunchTemplate LicenseSpecifications MaintenanceOptions Monitoring "
    "NetworkInterfaces NetworkPerformanceOptions Placement PrivateDnsNameOptions PrivateIpAddress "
    "RamdiskId SecurityGroupIds SecurityGroups SubnetId SubnetIds UserData",
    InstanceMarketOptions=keys(
        "MarketType",
        SpotOptions=keys(
            "MaxPrice SpotInstanceType BlockDurationMinutes ValidUntil InstanceInterruptionBehavior"
        ),
    ),
    BlockDeviceMappings=keys(
        "NoDevice DeviceName VirtualName",
        Ebs=keys(
            "DeleteOnTermination Iops SnapshotId VolumeSize VolumeType KmsKeyId Throughput "
            "OutpostArn Encrypted VolumeInitializationRate"
        ),
    ),
    IamInstanceProfile=keys("Arn Name"),
    MetadataOptions=keys(
        "HttpTokens HttpPutResponseHopLimit HttpEndpoint HttpProtocolIpv6 InstanceMetadataTags"
    ),
    TagSpecifications=keys("ResourceType", Tags=keys("Key Value")),
)

# Google Compute Engine's instances.insert; sourceInstanceTemplate is its parameter.
GCE = keys(
    "advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection "
    "description displayDevice hostname instanceEncryptionKey keyRevocationActionType labels "
    "machineType minCpuPlatform name networkInterfaces networkPerformanceConfig params "
    "privateIpv6GoogleAccess reservationAffinity resourcePolicies shieldedInstanceConfig "
    "sourceInstanceTemplate sourceMachineImage",
    disks=keys(
        "architecture autoDelete boot deviceName diskEncryptionKey diskSizeGb guestOsFeatures "
        "index interface licenses mode source type",
        initializeParams=keys(
            "description diskName diskSizeGb diskType labels onUpdateAction "
            "provisionedIops provisionedThroughput resourcePolicies sourceImage sourceSnapshot"
        ),
    ),
    guestAccelerators=keys("acceleratorType acceleratorCount"),
    metadata=keys("fingerprint", items=keys("key value")),
    scheduling=keys(
        "automaticRestart hostErrorTimeoutSeconds instanceTerminationAction maxRunDuration "
        "minNodeCpus nodeAffinities onHostMaintenance preemptible provisioningModel "
        "localSsdRecoveryTimeout onInstanceStopAction terminationTime availabilityDomain"
    ),
    serviceAccounts=keys("email scopes"),
    tags=keys("fingerprint", items=keys("")),
)

_CONTAINER = keys(
    "args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports "
    "readinessProbe securityContext startupProbe workingDir",
    resources=keys("limits requests claims"),
    volumeMounts=keys("mountPath name readOnly subPath subPathExpr mountPropagation"),
)
_POD = keys(
    "metadata",
    spec=keys(
        "affinity imagePullSecrets initContainers nodeSelector priorityClassName restartPolicy "
        "schedulerName securityContext serviceAccountName terminationGracePeriodSeconds "
        "topologySpreadConstraints volumes",
        containers=_CONTAINER,
        tolerations=keys("key operator value effect tolerationSeconds"),
    ),
)
# KubeRay's RayJob.
RAYJOB = keys(
    "apiVersion kind metadata",
    spec=keys(
        "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint "
        "entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata "
        "preRunningDeadlineSeconds runtimeEnvYAML shutdownAfterJobFinishes submissionMode "
        "submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished",
        rayClusterSpec=keys(
            "enableInTreeAutoscaling gcsFaultToleranceOptions headServiceAnnotations managedBy "
            "networkPolicy rayVersion suspend upgradeStrategy",
            authOptions=keys("mode secretName enableK8sTokenAuth"),
            autoscalerOptions=keys(
                "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext "
                "upscalingMode version volumeMounts"
            ),
            headGroupSpec=keys(
                "enableIngress headService labels rayStartParams resources serviceType",
                template=_POD,
            ),
            workerGroupSpecs=keys(
                "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts "
                "rayStartParams replicas resources scaleStrategy suspend",
                template=_POD,
            ),
        ),
    ),
)


def unknown(value: Any, tree: Tree | None, where: str) -> Iterator[str]:
    """One line for each key below `value` that `tree` does not know, with what was likely meant.

    >>> list(unknown({"Colour": 1}, keys("Color"), "box"))
    ['box.Colour: there is no such key; did you mean Color?']
    """
    if tree is None:
        return
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from unknown(item, tree, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, below in value.items():
            if key in tree:
                yield from unknown(below, tree[key], f"{where}.{key}")
            else:
                near = difflib.get_close_matches(str(key), tree, n=1)
                hint = f"did you mean {near[0]}?" if near else "remove it"
                yield f"{where}.{key}: there is no such key; {hint}"
