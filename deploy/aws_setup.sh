#!/usr/bin/env bash
# What cluster.yaml needs of an AWS account, once: a bucket, rights to it, and a closed network.
#
#   bash deploy/aws_setup.sh BUCKET us-west-2 203.0.113.7/32
#
# The last word is your own address: ssh is open to it and to nobody else. Not run on AWS; run
# against a simulation of it (tests/test_cluster_aws.py).
set -euo pipefail
export AWS_PAGER=""
bucket=$1 region=$2 address=$3
export AWS_DEFAULT_REGION=$region

# An account's first spot request fails without this role; it says so if the role is there.
aws iam create-service-linked-role --aws-service-name spot.amazonaws.com ||
  echo "the role for spot machines is there"
aws s3 mb "s3://$bucket" --region "$region"

allow() { # ACTIONS RESOURCES, as JSON lists
  echo "{\"Version\": \"2012-10-17\", \"Statement\": [
    {\"Effect\": \"Allow\", \"Action\": $1, \"Resource\": $2}]}"
}
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
  "Principal": {"Service": "ec2.amazonaws.com"}}]}'
for role in raymem-head raymem-worker; do
  aws iam create-role --role-name "$role" --assume-role-policy-document "$trust"
  aws iam put-role-policy --role-name "$role" --policy-name bucket --policy-document "$(allow \
    '["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]' \
    "[\"arn:aws:s3:::$bucket\", \"arn:aws:s3:::$bucket/*\"]")"
  aws iam create-instance-profile --instance-profile-name "$role"
  aws iam add-role-to-instance-profile --instance-profile-name "$role" --role-name "$role"
done
# The head starts and ends workers, and hands them their role.
worker=$(aws iam get-role --role-name raymem-worker --query Role.Arn --output text)
aws iam put-role-policy --role-name raymem-head --policy-name workers --policy-document "$(allow \
  '["ec2:Describe*", "ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags"]' '"*"')"
aws iam put-role-policy --role-name raymem-head --policy-name pass-worker \
  --policy-document "$(allow '["iam:PassRole"]' "[\"$worker\"]")"

# Ray leaves a group that has rules as it is; one that it makes opens ssh to the world.
network=$(aws ec2 describe-vpcs --filters Name=is-default,Values=true \
  --query 'Vpcs[0].VpcId' --output text)
group=$(aws ec2 create-security-group --group-name raymem --vpc-id "$network" \
  --description "raymem: the cluster's nodes, and ssh from one address" \
  --query GroupId --output text)
aws ec2 authorize-security-group-ingress --group-id "$group" --protocol=-1 --source-group "$group"
aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 22 \
  --cidr "$address"
